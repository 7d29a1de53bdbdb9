"""Readers of single files: text, JSON lines and Parquet, plain or compressed. They name what they cannot read."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zstandard

from linearard.errors import UserError

_DAMAGED = (OSError, EOFError, zlib.error, zstandard.ZstdError)


@dataclass
class BadRecords:
    """What was skipped, where and why; more than `limit` of them end the run."""

    limit: int = 0
    records: list[tuple[str, str]] = field(default_factory=list)  # (file:line or file, reason)
    empty: int = 0  # documents of white space only: counted, no error

    def skip(self, where: str, reason: str) -> None:
        """Counts one skipped record.

        Raises:
            UserError: The limit is exceeded.
        """
        self.records.append((where, reason))
        self.check()

    def check(self) -> None:
        """Raises UserError where more was skipped than the limit allows."""
        if len(self.records) <= self.limit:
            return
        shown = "; ".join(f"{where}: {reason}" for where, reason in self.records[:5])
        more = f"; and {len(self.records) - 5} more" if len(self.records) > 5 else ""
        raise UserError(
            f"data: {len(self.records)} unreadable record(s), data.max_bad_records allows {self.limit}: {shown}{more}. "
            "Repair them, or raise data.max_bad_records to skip them"
        )


def file_kind(path: Path) -> str:
    """text, jsonl or parquet, by the file's name without .gz or .zst."""
    name = path.name.lower().removesuffix(".gz").removesuffix(".zst")
    if name.endswith((".jsonl", ".ndjson", ".json")):
        return "jsonl"
    return "parquet" if name.endswith(".parquet") else "text"


def open_binary(path: Path) -> io.BufferedIOBase:
    """Opens a file for reading, decompressing .gz and .zst by name.

    Raises:
        OSError: Missing, unreadable, or not a regular file (a pipe would block).
    """
    if not path.is_file():
        raise FileNotFoundError("not a readable file")
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdFile(path), buffer_size=1 << 20)
    return open(path, "rb")


class _ZstdFile(io.RawIOBase):
    """Zstandard frames, one after another. zstandard's own stream reader takes a truncated file for a short one."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 - closed in close()
        self._frame: Any = None
        self._plain = b""

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            packed = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            packed = packed or self._file.read(1 << 17)
            if not packed:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("the file ends inside a compressed frame")
                return 0
            if self._frame is None or self._frame.eof:
                # the default limit refuses what `zstd --long=31` writes
                self._frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            self._plain = self._frame.decompress(packed)
        size = min(len(buffer), len(self._plain))
        buffer[:size] = self._plain[:size]
        self._plain = self._plain[size:]
        return size


def read_text(path: Path, where: str, bad: BadRecords) -> Iterator[str]:
    """The one document of a text file, newlines as they are, without a byte order mark."""
    try:
        with open_binary(path) as file:
            yield file.read().decode("utf-8-sig")
    except _DAMAGED as error:
        bad.skip(where, f"cannot be read ({_reason(error)})")
    except UnicodeDecodeError as error:
        bad.skip(where, f"not UTF-8 at byte {error.start}")


def read_jsonl(path: Path, where: str, text_field: str, bad: BadRecords) -> Iterator[str]:
    """The text of every line; bad lines are skipped by number, a damaged file from the damage on."""
    number = 0
    try:
        with open_binary(path) as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                text, reason = _json_text(line, text_field)
                if text is None:
                    bad.skip(f"{where}:{number}", reason)
                else:
                    yield text
    except _DAMAGED as error:
        bad.skip(where, f"cannot be read after line {number} ({_reason(error)})")


def _json_text(line: bytes, text_field: str) -> tuple[str | None, str]:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return None, f"not UTF-8 at byte {error.start}"
    except json.JSONDecodeError as error:
        return None, f"not JSON ({error.msg} at column {error.colno})"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, nesting of thousands of levels
        return None, f"not usable JSON ({_reason(error)})"
    if not isinstance(record, dict):
        return None, f"not a JSON object but {type(record).__name__}"
    if text_field not in record:
        keys = ", ".join(map(repr, list(record)[:8]))
        return None, f"no field {text_field!r} (text_field); it has {keys or 'none'}"
    return checked_text(record[text_field], text_field)


def checked_text(value: object, text_field: str) -> tuple[str | None, str]:
    """(text, "") where the value is text that a tokenizer can take, (None, reason) otherwise."""
    if not isinstance(value, str):
        return None, f"{text_field!r} is not text but {type(value).__name__}"
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair; no tokenizer can take it
        return None, f"{text_field!r} holds an unpaired surrogate"
    return value, ""


def read_parquet(path: Path, where: str, text_field: str, bad: BadRecords) -> Iterator[str]:
    """The text of every row; bad rows are skipped by number (from 1), a damaged file from the damage on."""
    import pyarrow
    from pyarrow import parquet

    row = 0
    try:
        if not path.is_file():
            raise FileNotFoundError("not a readable file")
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if text_field not in columns:
                bad.skip(where, f"no column {text_field!r} (text_field); it has {', '.join(map(repr, columns))}")
                return
            for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
                for scalar in batch.column(0):
                    row += 1
                    try:
                        text, reason = checked_text(scalar.as_py(), text_field)
                    except UnicodeDecodeError as error:
                        text, reason = None, f"not UTF-8 at byte {error.start}"
                    if text is None:
                        bad.skip(f"{where}:{row}", reason)
                    else:
                        yield text
    except (pyarrow.ArrowException, OSError) as error:
        bad.skip(where, f"cannot be read after row {row} ({_reason(error)})")


def _reason(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
