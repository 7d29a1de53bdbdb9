"""The tokenised corpus: built once into a memory-mapped cache that is keyed by content and settings."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from linearard.config import DataConfig
from linearard.data.readers import BadRecords
from linearard.data.sources import FileHashes, OpenSource, content_key, iter_documents, open_source
from linearard.data.tokenizer import encode_documents, largest_token_id
from linearard.errors import UserError

_FORMAT = 1  # raise it when the same input would give other tokens, offsets or splits
_CHUNK_CHARACTERS = 1 << 21  # text handed to the tokenizer at once
_CHUNK_DOCUMENTS = 1024
_STALE_SECONDS = 24 * 3600


@dataclass(frozen=True)
class Report:
    """What a corpus holds and what was left out of it."""

    documents: int
    tokens: int
    train_documents: int
    train_tokens: int
    held_out_documents: int
    held_out_tokens: int
    empty_documents: int  # white space only
    short_documents: int  # fewer than min_document_tokens
    skipped: tuple[tuple[str, str], ...]  # (file:line or file, reason)
    source_documents: tuple[int, ...]  # per source, as configured

    def describe(self) -> str:
        """One line for people."""
        return (
            f"{self.documents:,} documents, {self.tokens:,} tokens: {self.train_documents:,} documents "
            f"({self.train_tokens:,} tokens) to train on, {self.held_out_documents:,} ({self.held_out_tokens:,}) held "
            f"out; left out: {self.empty_documents:,} empty, {self.short_documents:,} too short, "
            f"{len(self.skipped):,} unreadable"
        )


class Documents:
    """A read-only list of tokenised documents inside one token array.

    Attributes:
        name: Identifies the documents and their tokens.
        tokens_array: All tokens, unsigned integers [total]; a memory map.
        starts: First token of each document, int64 [documents].
        lengths: Tokens of each document, int64 [documents].
    """

    def __init__(self, tokens_array: np.ndarray, starts: np.ndarray, lengths: np.ndarray, name: str) -> None:
        self.tokens_array = tokens_array
        self.starts = np.asarray(starts, np.int64)
        self.lengths = np.asarray(lengths, np.int64)
        self.name = name

    def __len__(self) -> int:
        return len(self.starts)

    def tokens(self, index: int) -> np.ndarray:
        """Tokens of one document, unsigned integers [length]; a view."""
        start = self.starts[index]
        return self.tokens_array[start : start + self.lengths[index]]

    @property
    def total_tokens(self) -> int:
        """Tokens of all documents together."""
        return int(self.lengths.sum())


class Corpus:
    """A tokenised corpus in its cache folder, split by document.

    Attributes:
        key: Hash of content, settings and tokenizer; the name of the cache folder.
        report: Counts, and what was skipped.
        train: Documents to train on.
        held_out: Documents never trained on.
    """

    def __init__(self, folder: Path) -> None:
        self.key = folder.name
        try:
            meta = json.loads((folder / "report.json").read_text())
            offsets = np.load(folder / "offsets.npy", mmap_mode="r")
            held_out = np.load(folder / "held_out.npy")
            dtype = np.dtype(meta["dtype"])
            if (folder / "tokens.bin").stat().st_size != int(offsets[-1]) * dtype.itemsize:
                raise ValueError("tokens.bin has the wrong size")
            # numpy cannot map an empty file
            tokens = np.memmap(folder / "tokens.bin", dtype, "r") if offsets[-1] else np.empty(0, dtype)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"data.cache_dir: {folder} is damaged ({error}); delete it and start again") from None
        counts = meta["report"]
        counts["skipped"] = tuple((where, reason) for where, reason in counts["skipped"])
        counts["source_documents"] = tuple(counts["source_documents"])
        self.report = Report(**counts)
        lengths = np.diff(offsets)
        self.train, self.held_out = (
            Documents(tokens, offsets[:-1][side], lengths[side], f"{self.key}/{name}")
            for name, side in (("train", ~held_out), ("held_out", held_out))
        )


def prepare(config: DataConfig, tokenizer: Any, tokenizer_fingerprint: str, *, progress: bool = True) -> Corpus:
    """Opens the tokenised corpus, building its cache first where there is none for this content and these settings.

    In a distributed run let one process call it first, then a barrier, then the others: they find the cache. Two
    processes that build at once do no harm, one of the two results is kept.

    Args:
        config: Sources, split and token settings; `cache_dir` must be shared by the ranks of one machine.
        tokenizer: Used only when the cache has to be built.
        tokenizer_fingerprint: From `tokenizer_fingerprint`.
        progress: Show a progress bar while building.

    Raises:
        UserError: Sources unusable, more bad records than allowed, less text than one sequence, or a damaged cache.
    """
    sources = [open_source(s, f"data.sources.{i}", config.num_proc) for i, s in enumerate(config.sources)]
    if not sources:
        raise UserError("data.sources: empty; list at least one {path: ...} or {name: ...}")
    cache = Path(config.cache_dir).expanduser()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        hashes = FileHashes(cache / "file_hashes.json")
        content = [content_key(source, hashes) for source in sources]
        hashes.save()
    except OSError as error:
        raise UserError(f"data.cache_dir: {cache} cannot be written ({error}); name a folder that can") from None
    settings = {
        "format": _FORMAT,
        "tokenizer": tokenizer_fingerprint,
        "add_bos": config.add_bos,
        "add_eos": config.add_eos,
        "min_document_tokens": config.min_document_tokens,
        "held_out_fraction": config.held_out_fraction,
        "sources": content,
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
    if not (cache / key).is_dir():
        _build(cache, key, config, sources, tokenizer, progress)
    corpus = Corpus(cache / key)
    # The limit is no part of the key: a cache built under a generous limit does not override a strict one.
    BadRecords(config.max_bad_records, list(corpus.report.skipped)).check()
    if corpus.report.train_tokens < config.seq_len:
        raise UserError(
            f"data.sources: {corpus.report.train_tokens:,} tokens to train on ({corpus.report.describe()}); one "
            f"sequence needs data.seq_len {config.seq_len:,}; add text or shorten data.seq_len"
        )
    return corpus


def _build(
    cache: Path, key: str, config: DataConfig, sources: list[OpenSource], tokenizer: Any, progress: bool
) -> None:
    """Writes the cache into a temporary folder and renames it: there is a whole cache or none."""
    for stale in cache.glob(".building-*"):  # left behind by killed processes
        with contextlib.suppress(OSError):
            if time.time() - max(path.stat().st_mtime for path in (stale, *stale.iterdir())) > _STALE_SECONDS:
                shutil.rmtree(stale, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".building-{key[:8]}-", dir=cache))
    try:
        _write(temporary, config, sources, tokenizer, progress)
        temporary.chmod(0o755)  # mkdtemp's folders are private; a cache is often shared
        try:
            os.rename(temporary, cache / key)
        except OSError:
            if not (cache / key).is_dir():
                raise
            shutil.rmtree(temporary)  # another process was faster; its content is the same
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"data.cache_dir: the cache cannot be written to {cache} ({error}); free space or name another"
        ) from None
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write(folder: Path, config: DataConfig, sources: list[OpenSource], tokenizer: Any, progress: bool) -> None:
    dtype = np.dtype(np.uint16 if largest_token_id(tokenizer) <= np.iinfo(np.uint16).max else np.uint32)
    bad = BadRecords(config.max_bad_records)
    lengths, identities, roles = array("q"), array("Q"), array("B")
    per_source, short = [], 0
    sizes = [source.size() for source in sources]
    bar = tqdm(
        total=None if None in sizes else sum(size or 0 for size in sizes),
        desc="tokenising", unit="B", unit_scale=True, disable=not progress,
    )  # fmt: skip
    with open(folder / "tokens.bin", "wb") as file, bar, _tokenizer_threads(config.num_proc):
        for number, source in enumerate(sources):
            before = len(lengths)
            for chunk in _chunks(iter_documents(source, bad)):
                texts = [text for _, text in chunk]
                encoded = encode_documents(tokenizer, texts, add_bos=config.add_bos, add_eos=config.add_eos)
                for (identity, _), ids in zip(chunk, encoded, strict=True):
                    if len(ids) < config.min_document_tokens:
                        short += 1
                        continue
                    np.asarray(ids, dtype).tofile(file)
                    lengths.append(len(ids))
                    identities.append(_hash(identity))
                    roles.append(number)
                bar.update(sum(len(text.encode()) for text in texts))
                bar.set_postfix(documents=len(lengths), skipped=len(bad.records), refresh=False)
            per_source.append(len(lengths) - before)
        file.flush()
        os.fsync(file.fileno())
    length = np.asarray(lengths, np.int64)
    role = np.asarray([source.config.role for source in sources])[np.asarray(roles, np.int64)]
    held_out = _held_out(np.asarray(identities, np.uint64), role, config.held_out_fraction)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(length)])
    report = Report(
        documents=len(length),
        tokens=int(length.sum()),
        train_documents=int((~held_out).sum()),
        train_tokens=int(length[~held_out].sum()),
        held_out_documents=int(held_out.sum()),
        held_out_tokens=int(length[held_out].sum()),
        empty_documents=bad.empty,
        short_documents=short,
        skipped=tuple(bad.records),
        source_documents=tuple(per_source),
    )
    np.save(folder / "offsets.npy", offsets)
    np.save(folder / "held_out.npy", held_out)
    (folder / "report.json").write_text(json.dumps({"dtype": dtype.name, "report": asdict(report)}, indent=1))


def _held_out(identities: np.ndarray, role: np.ndarray, fraction: float) -> np.ndarray:
    """Which documents are held out: bool [documents], from hashes uint64 [documents] and roles [documents]."""
    split = role == "both"
    chosen = (role == "held_out") | (split & (identities < np.uint64(int(fraction * 2**64))))
    # A small corpus may have no document below the threshold; the one nearest to it stands in.
    if fraction > 0 and not chosen.any() and split.sum() > 1:
        candidates = np.flatnonzero(split)
        chosen |= split & (identities == identities[candidates].min())
    return chosen


def is_held_out(relative: str, fraction: float) -> bool:
    """Whether a text file is held out: `relative` is its path in its tree, with forward slashes."""
    return _hash("path:" + relative) < int(fraction * 2**64)  # the identity that `sources.iter_documents` gives it


def _hash(identity: str) -> int:
    return int.from_bytes(hashlib.blake2b(identity.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big")


def _chunks(documents: Iterator[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    chunk: list[tuple[str, str]] = []
    characters = 0
    for document in documents:
        chunk.append(document)
        characters += len(document[1])
        if characters >= _CHUNK_CHARACTERS or len(chunk) >= _CHUNK_DOCUMENTS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


@contextlib.contextmanager
def _tokenizer_threads(count: int) -> Iterator[None]:
    """Lets the fast tokenizer use `count` threads; its pool takes the number at its first use in a process."""
    names = ("TOKENIZERS_PARALLELISM", "RAYON_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(zip(names, ("true" if count > 1 else "false", str(count)), strict=True))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
