"""Sources of documents: which files or rows there are, a hash of their content, and their text one by one."""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linearard.config import SourceConfig
from linearard.data.readers import BadRecords, checked_text, file_kind, read_jsonl, read_parquet, read_text
from linearard.errors import UserError

_STRUCTURED = ("*.jsonl", "*.ndjson", "*.parquet", "*.jsonl.gz", "*.ndjson.gz", "*.jsonl.zst", "*.ndjson.zst")
_JSON = (*_STRUCTURED[:2], *_STRUCTURED[3:], "*.json", "*.json.gz", "*.json.zst")


@dataclass(frozen=True)
class SourceFile:
    """A file of a source."""

    path: Path
    relative: str  # to the tree, with forward slashes: the document's name wherever the tree is moved
    kind: str  # text | jsonl | parquet


@dataclass(frozen=True)
class OpenSource:
    """A source whose files are listed, or whose data set is loaded; nothing of it is tokenised yet."""

    config: SourceConfig
    field_name: str  # for messages: data.sources.0
    files: tuple[SourceFile, ...] = ()
    dataset: Any = None

    def size(self) -> int | None:
        """Bytes of text to come, None where that is not known beforehand."""
        if self.dataset is not None or self.config.max_documents is not None:
            return None
        if any(f.kind == "parquet" or f.path.suffix in (".gz", ".zst") for f in self.files):
            return None
        return sum(f.path.stat().st_size for f in self.files if f.path.is_file())


def open_source(config: SourceConfig, field_name: str = "data.sources.0", num_proc: int = 1) -> OpenSource:
    """Lists a source's files in a fixed order, or loads its data set.

    Hidden files and folders of a tree (names that start with a dot) are left out.

    Raises:
        UserError: No such path, no matching file, an unclear mixture of formats, or a data set that cannot be loaded.
    """
    if (config.path is None) == (config.name is None):
        raise UserError(f"{field_name}: give exactly one of path and name")
    if config.name is not None:
        return OpenSource(config, field_name, dataset=_load_dataset(config, field_name, num_proc))
    files = _list_files(config, field_name)
    return OpenSource(config, field_name, files=tuple(sorted(files, key=lambda file: file.relative)))


def _list_files(config: SourceConfig, field_name: str) -> list[SourceFile]:
    path = Path(str(config.path)).expanduser()
    kind = None if config.format == "auto" else config.format
    if path.is_dir():
        return _list_tree(config, path, field_name)
    if path.exists():
        return [SourceFile(path, path.name, kind or file_kind(path))]
    if not glob.has_magic(str(path)):
        raise UserError(f"{field_name}.path: {config.path} does not exist; give a file, a folder or a glob pattern")
    parts = path.parts
    root = Path(*parts[: next(i for i, part in enumerate(parts) if glob.has_magic(part))])
    found = [Path(match) for match in glob.glob(str(path), recursive=True)]
    files = [SourceFile(p, p.relative_to(root).as_posix(), kind or file_kind(p)) for p in found if not p.is_dir()]
    files = [file for file in files if not _matches(file.relative, config.exclude)]
    if not files:
        raise UserError(f"{field_name}.path: no file matches {config.path} (less exclude {list(config.exclude)})")
    return files


def _list_tree(config: SourceConfig, root: Path, field_name: str) -> list[SourceFile]:
    if config.format == "text":
        patterns = config.include
    elif config.format == "jsonl":
        patterns = _JSON
    elif config.format == "parquet":
        patterns = ("*.parquet",)
    else:
        patterns = (*config.include, *_STRUCTURED)
    files: list[SourceFile] = []

    def unreadable(error: OSError) -> None:
        # A folder that cannot be listed becomes a file that cannot be read, and so is counted and named.
        files.append(_tree_file(root, Path(error.filename), "text"))

    for folder, folders, names in os.walk(root, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if name.startswith(".") or not _matches(name, patterns):
                continue
            path = Path(folder, name)
            files.append(_tree_file(root, path, file_kind(path) if config.format == "auto" else config.format))
    files = [file for file in files if not _matches(file.relative, config.exclude)]
    if not files:
        raise UserError(
            f"{field_name}.path: no file below {config.path} matches {', '.join(patterns)} "
            f"(less exclude {list(config.exclude)}); set include, exclude or format"
        )
    kinds = sorted({file.kind for file in files})
    if len(kinds) > 1:
        counts = ", ".join(f"{sum(file.kind == kind for file in files)} {kind}" for kind in kinds)
        raise UserError(
            f"{field_name}.format: {config.path} holds files of several kinds ({counts}); set format to one"
        )
    return files


def _tree_file(root: Path, path: Path, kind: str) -> SourceFile:
    return SourceFile(path, path.relative_to(root).as_posix(), kind)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _load_dataset(config: SourceConfig, field_name: str, num_proc: int) -> Any:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        dataset: Any = datasets.load_dataset(
            str(config.name), config.subset, split=config.split, num_proc=num_proc if num_proc > 1 else None
        )
    except ConnectionError as error:
        raise UserError(
            f"{field_name}.name: the Hugging Face hub cannot be reached and {config.name} is not in the local cache "
            f"({_first_line(error)}); connect, fill the cache beforehand, or use path"
        ) from None
    except (OSError, ValueError, KeyError, DatasetsError) as error:
        raise UserError(
            f"{field_name}.name: the data set {config.name} (subset {config.subset}, split {config.split}) "
            f"cannot be loaded: {_first_line(error)}"
        ) from None
    if config.text_field not in dataset.column_names:
        columns = ", ".join(dataset.column_names)
        raise UserError(f"{field_name}.text_field: {config.name} has no column {config.text_field!r}; it has {columns}")
    return dataset.select_columns([config.text_field])


def iter_documents(source: OpenSource, bad: BadRecords) -> Iterator[tuple[str, str]]:
    """Yields (identity, text) of every document that is not empty, at most `max_documents`.

    The identity is the relative path for text files and the text itself for rows: it decides on which side of the
    held-out split a document falls, so it does not change when other documents come or go.

    Raises:
        UserError: More bad records than `bad.limit`.
    """
    limit = source.config.max_documents
    documents = 0
    for identity, text in _all_documents(source, bad):
        if not text.strip():
            bad.empty += 1
            continue
        documents += 1
        yield identity, text
        if documents == limit:
            return


def _all_documents(source: OpenSource, bad: BadRecords) -> Iterator[tuple[str, str]]:
    text_field = source.config.text_field
    if source.dataset is not None:
        for number, row in enumerate(source.dataset, 1):
            text, reason = checked_text(row[text_field], text_field)
            if text is None:
                bad.skip(f"{source.config.name}:{number}", reason)
            else:
                yield "text:" + text, text
        return
    for file in source.files:
        where = str(file.path)
        if file.kind == "text":
            for text in read_text(file.path, where, bad):
                yield "path:" + file.relative, text
        else:
            reader = read_jsonl if file.kind == "jsonl" else read_parquet
            for text in reader(file.path, where, text_field, bad):
                yield "text:" + text, text


# ------------------------------------------------------------------------------------------- content hashes


def content_key(source: OpenSource, memo: FileHashes) -> dict[str, Any]:
    """What a source's documents depend on, as JSON: names and hashes of content, and its settings."""
    config = source.config
    settings = {"text_field": config.text_field, "max_documents": config.max_documents, "role": config.role}
    if source.dataset is not None:
        return {**settings, "dataset": source.dataset._fingerprint}
    return {**settings, "files": [[file.relative, file.kind, memo.sha256(file.path)] for file in source.files]}


class FileHashes:
    """sha256 of files, remembered by path, size and time of change: a large corpus is not read at each start."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._changed = False
        try:
            self._known: dict[str, list[Any]] = json.loads(path.read_text())
        except (OSError, ValueError):  # absent or half written by an old program: only a matter of speed
            self._known = {}

    def sha256(self, path: Path) -> str:
        """The hash of the file's bytes, or a word for a file that cannot be read."""
        try:
            if not path.is_file():
                return "unreadable"
            name, status = str(path.resolve()), path.stat()
            stamp = [status.st_size, status.st_mtime_ns, status.st_ino]
            known = self._known.get(name)
            if known is not None and known[:3] == stamp:
                return known[3]
            content = hashlib.sha256()
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    content.update(block)
            digest = content.hexdigest()
        except OSError:
            return "unreadable"
        # A file written this very moment can change again without a change of its time stamp.
        if time.time_ns() - status.st_mtime_ns > 2_000_000_000:
            self._known[name] = [*stamp, digest]
            self._changed = True
        return digest

    def save(self) -> None:
        """Writes what was learnt; of two processes at once the last one wins, which costs only time."""
        if not self._changed:
            return
        temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(self._known))
        os.replace(temporary, self._path)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
