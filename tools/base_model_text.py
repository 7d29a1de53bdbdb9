"""The text of the demo's base model: what train_base_model.py reads and leaves out, and the tokenizer learnt on it.

The library files that the demo evaluates on (`linearard.data.is_held_out`) stay out of it, copies included.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from linearard.data import is_held_out
from linearard.errors import UserError

SKIPPED_DIRS = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
SKIPPED_DIRS |= {"lib2to3", "encodings", "__pycache__", "turtledemo"}
PACKAGE_SUFFIXES = {".py", ".pyi", ".md", ".rst", ".txt"}
MAX_FILE_BYTES = 1_000_000
HELD_OUT_FRACTION = 0.05
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
# A word takes one leading space or sign ("_name", ".name"); digits stand alone; a line break takes the blank
# lines and the indentation after it, but for the last space, which belongs to the next word.
PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+(?:[ \t]+(?!\S))?|\s+(?!\S)|\s+"


@dataclass
class Corpus:
    """Texts of the training and the held-out files, and how many files were left out, by reason."""

    train: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    library_files: int = 0


def useful_lines(text: str) -> set[str]:
    """Lines long enough to tell one file from another."""
    return {line for line in map(str.strip, text.splitlines()) if len(line) >= 12}


class CopyDetector:
    """Recognises exact and near copies of the held-out files."""

    def __init__(self, held_out: dict[str, str]):
        self.digests = {digest(text) for text in held_out.values()}
        self.files = [(name.rsplit("/", 1)[-1], len(useful_lines(text))) for name, text in held_out.items()]
        self.index: dict[str, list[int]] = defaultdict(list)
        for number, text in enumerate(held_out.values()):
            for line in useful_lines(text):
                self.index[line].append(number)

    def is_copy(self, basename: str, text: str) -> bool:
        """True for equal content, or for half of the held-out file's lines (same name: of either's) shared."""
        if digest(text) in self.digests:
            return True
        lines = useful_lines(text)
        shared = Counter(number for line in lines for number in self.index.get(line, ()))
        for number, count in shared.items():
            name, size = self.files[number]
            limit = min(size, len(lines)) if name == basename else size
            if count >= 5 and 2 * count > limit:
                return True
        return False


def digest(text: str) -> bytes:
    """SHA-256 of a text, blind to the line-break convention."""
    return hashlib.sha256(text.replace("\r\n", "\n").encode()).digest()


def looks_generated(text: str) -> bool:
    """True for tables and minified files: very long lines, or more than 30 % digits."""
    lines = text.count("\n") + 1
    return len(text) > 200 * lines or sum(map(text.count, "0123456789")) > 0.3 * len(text)


def read_text(path: Path, skipped: Counter[str]) -> str | None:
    """The text of a file, or None (and the reason counted) where it is not worth training on."""
    try:
        data = path.read_bytes()
    except OSError:
        skipped["unreadable"] += 1
        return None
    if len(data) > MAX_FILE_BYTES:
        skipped["larger than 1 MB"] += 1
        return None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        skipped["not UTF-8"] += 1
        return None
    if not text.strip():
        skipped["empty"] += 1
        return None
    return text


def read_corpus(stdlib: Path, packages: list[Path]) -> Corpus:
    """Read the library and the package trees, keeping held-out files and their copies out of training."""
    corpus, held_out, library = Corpus(), {}, {}
    for path in sorted(stdlib.rglob("*.py")):
        identity = path.relative_to(stdlib)
        if SKIPPED_DIRS.isdisjoint(identity.parts[:-1]):
            text = read_text(path, corpus.skipped)
            if text is not None:
                name = identity.as_posix()
                (held_out if is_held_out(name, HELD_OUT_FRACTION) else library)[name] = text
    if not held_out or not library:
        counts = f"{len(library)} training and {len(held_out)} held-out files"
        raise UserError(f"--stdlib {stdlib}: {counts}; needs some of both")
    copies, seen = CopyDetector(held_out), set()

    def keep(basename: str, text: str) -> None:
        if digest(text) in seen:
            corpus.skipped["exact duplicate"] += 1
        elif looks_generated(text):
            corpus.skipped["looks generated"] += 1
        elif copies.is_copy(basename, text):
            corpus.skipped["copy of a held-out file"] += 1
        else:
            seen.add(digest(text))
            corpus.train.append(text)

    for name, text in library.items():
        keep(name.rsplit("/", 1)[-1], text)
    corpus.library_files = len(corpus.train)
    for tree in packages:
        for path in sorted(tree.rglob("*")):
            if path.suffix in PACKAGE_SUFFIXES and path.is_file():
                text = read_text(path, corpus.skipped)
                if text is not None:
                    keep(path.name, text)
    corpus.held_out = list(held_out.values())
    return corpus


def train_tokenizer(texts: list[str], vocab_size: int, max_bytes: int, seed: int) -> Tokenizer:
    """Byte-level BPE learnt from a random choice of the texts of at most `max_bytes` characters."""
    chosen, total = [], 0
    for text in random.Random(seed).sample(texts, len(texts)):
        if total < max_bytes:
            chosen.append(text)
            total += len(text)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=32,
        show_progress=False,
    )
    tokenizer.train_from_iterator(chosen, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[torch.Tensor]:
    """int16 token ids of each text, BOS first. A special token's name inside a text is plain text here."""
    tokenizer.encode_special_tokens = True
    bos, documents = tokenizer.token_to_id(BOS), []
    for start in range(0, len(texts), 1024):
        for encoding in tokenizer.encode_batch_fast(texts[start : start + 1024], add_special_tokens=False):
            documents.append(torch.tensor([bos, *encoding.ids], dtype=torch.int16))
    tokenizer.encode_special_tokens = False
    return documents
