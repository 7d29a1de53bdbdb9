"""Every format, and every way in which a file or a record can be bad: counted, named, skipped."""

from __future__ import annotations

import gzip
import json
import os

import pytest

from linearard.config import SourceConfig
from linearard.data.readers import BadRecords
from linearard.data.sources import FileHashes, iter_documents, open_source
from linearard.errors import UserError

zstandard = pytest.importorskip("zstandard")


def read(limit: int = 100, **config):
    """(texts, bad records) of a source."""
    bad = BadRecords(limit)
    documents = list(iter_documents(open_source(SourceConfig(**config)), bad))
    return [text for _, text in documents], bad


def lines(*records) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def write_parquet(path, column, name="text"):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({name: column}), path)


# ------------------------------------------------------------------------------------------------- formats


def test_text_tree(tmp_path):
    for name, text in {
        "b.txt": "bee", "a.md": "\ufeffay", "sub/c.py": "sea", "sub/skip.py": "no", "d.bin": "no", ".git/e.txt": "no",
        ".hidden.txt": "no", "empty.txt": " \n",
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    bad = BadRecords()
    source = open_source(SourceConfig(path=str(tmp_path), exclude=("sub/sk*",)))
    documents = list(iter_documents(source, bad))
    assert documents == [("path:a.md", "ay"), ("path:b.txt", "bee"), ("path:sub/c.py", "sea")]
    assert bad.empty == 1 and not bad.records
    assert source.size() == 3 + 2 + 3 + 3 + 2


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_jsonl(tmp_path, suffix):
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(pack(lines({"text": "one"}, {"text": "é"}) + b"\n") + pack(lines({"text": "three"})))
    assert read(path=str(path))[0] == ["one", "é", "three"]  # of several frames, too
    assert read(path=str(tmp_path))[0] == ["one", "é", "three"]
    assert read(path=str(tmp_path / "*.jsonl*"), max_documents=2)[0] == ["one", "é"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_text(tmp_path, suffix):
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    (tmp_path / f"a.txt{suffix}").write_bytes(pack("grüße".encode()))
    assert read(path=str(tmp_path / f"a.txt{suffix}"))[0] == ["grüße"]
    assert read(path=str(tmp_path), include=("*.txt*",))[0] == ["grüße"]


def test_parquet_and_other_column(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["one", "two"], name="content")
    assert read(path=str(tmp_path), text_field="content")[0] == ["one", "two"]


def test_huggingface_data_set_by_name(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(
        lines({"text": "one", "n": 1}, {"text": None, "n": 2}, {"text": "three", "n": 3})
    )
    texts, bad = read(name=str(folder))
    assert texts == ["one", "three"]
    assert bad.records == [(f"{folder}:2", "'text' is not text but NoneType")]
    with pytest.raises(UserError, match=r"data\.sources\.0\.text_field: .* it has text, n"):
        read(name=str(folder), text_field="body")
    with pytest.raises(UserError, match=r"split nosuch.*cannot be loaded.*train"):
        read(name=str(folder), split="nosuch")


def test_hub_out_of_reach(monkeypatch):
    datasets = pytest.importorskip("datasets")
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="hub cannot be reached") as caught:
        read(name="no-such-owner/no-such-corpus")
    assert "data.sources.0.name" in str(caught.value) and "\n" not in str(caught.value)


def test_file_hashes_are_remembered_but_never_stale(tmp_path):
    path, memo = tmp_path / "a.txt", tmp_path / "hashes.json"
    path.write_text("one")
    stamp = path.stat().st_mtime_ns
    hashes = FileHashes(memo)
    first = hashes.sha256(path)
    path.write_text("two")
    os.utime(path, ns=(stamp, stamp))  # changed within one tick of the clock
    second = hashes.sha256(path)
    assert second != first

    old = stamp - 10_000_000_000
    os.utime(path, ns=(old, old))
    assert hashes.sha256(path) == second
    hashes.save()
    again = FileHashes(memo)
    path.open("r+").write("six")
    os.utime(path, ns=(old, old))
    assert again.sha256(path) == second  # not read again
    os.utime(path, ns=(old + 1, old + 1))
    assert again.sha256(path) not in (first, second)
    memo.write_text("[")
    assert FileHashes(memo).sha256(path) == again.sha256(path)
    assert again.sha256(tmp_path / "missing") == "unreadable"


# ------------------------------------------------------------------------------------------- hostile records


def test_bad_lines_are_named_and_skipped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        lines({"text": "one"})  # 1
        + b'{"text": "cut\n'  # 2
        + b'{"text": "\xff\xfe"}\n'  # 3
        + lines(["a", "list"], {"body": "x"}, {"text": None}, {"text": 5}, {"text": "\ud800"})  # 4-8
        + b"[" * 100_000 + b"\n"  # 9
        + b'{"text": ' + b"9" * 10_000 + b"}\n"  # 10
        + b"\n"  # 11, blank: no record
        + lines({"text": "  "}, {"text": "last"})  # 12, 13
    )  # fmt: skip
    texts, bad = read(path=str(path))
    assert texts == ["one", "last"]
    assert [where for where, _ in bad.records] == [f"{path}:{n}" for n in range(2, 11)]
    reasons = [reason for _, reason in bad.records]
    for reason, part in zip(
        reasons, ("not JSON", "UTF-8", "list", "'body'", "NoneType", "int", "surrogate", "usable", ""), strict=True
    ):
        assert part in reason
    assert bad.empty == 1


def test_limit_and_its_message(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"text": "one"}, 1, 2, 3, {"text": "two"}))
    assert read(limit=3, path=str(path))[0] == ["one", "two"]
    with pytest.raises(UserError) as caught:
        read(limit=2, path=str(path))
    message = str(caught.value)
    assert "max_bad_records" in message and all(f"{path}:{n}" in message for n in (2, 3, 4)) and "\n" not in message
    with pytest.raises(UserError, match=r"a\.jsonl:2"):
        read(limit=0, path=str(path))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["truncated", "by one byte", "garbage", "trailing garbage"])
def test_damaged_compressed_files(tmp_path, suffix, damage):
    many = lines(*({"text": f"{i} {os.urandom(20).hex()}"} for i in range(2000)))
    packed = gzip.compress(many) if suffix == ".gz" else zstandard.ZstdCompressor().compress(many)
    content = {
        "truncated": packed[: len(packed) // 2],
        "by one byte": packed[:-1],
        "garbage": b"no such thing" * 10,
        "trailing garbage": packed + b"no such thing",
    }[damage]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(content)
    (tmp_path / "b.jsonl").write_bytes(lines({"text": "fine"}))
    texts, bad = read(path=str(tmp_path))
    assert texts[-1] == "fine" and len(bad.records) == 1
    assert bad.records[0][0].endswith(f"a.jsonl{suffix}") and "cannot be read" in bad.records[0][1]
    assert all(text.startswith(f"{i} ") for i, text in enumerate(texts[:-1]))  # what came before the damage is whole


def test_bad_text_files(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc\xffdef")
    (tmp_path / "b.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "c.txt")  # would block for ever
    (tmp_path / "d.txt").write_text("fine")
    texts, bad = read(path=str(tmp_path))
    assert texts == ["fine"]
    assert [os.path.basename(where) for where, _ in bad.records] == ["a.txt", "b.txt", "c.txt"]
    assert bad.records[0][1] == "not UTF-8 at byte 3"


def test_bad_parquet_files(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    write_parquet(tmp_path / "a.parquet", ["one", None, "three"])
    write_parquet(tmp_path / "b.parquet", [1, 2])
    write_parquet(tmp_path / "c.parquet", ["x"], name="body")
    write_parquet(tmp_path / "d.parquet", pyarrow.array([b"\xff", b"ok"], pyarrow.binary()).view(pyarrow.string()))
    (tmp_path / "e.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    (tmp_path / "f.parquet").write_bytes(b"")
    texts, bad = read(path=str(tmp_path))
    assert texts == ["one", "three", "ok"]
    named = [os.path.basename(where) for where, _ in bad.records]
    assert named == ["a.parquet:2", "b.parquet:1", "b.parquet:2", "c.parquet", "d.parquet:1", "e.parquet", "f.parquet"]
    assert "'body'" in bad.records[3][1]


def test_parquet_damaged_in_the_middle(tmp_path):
    write_parquet(tmp_path / "a.parquet", [os.urandom(50).hex() for _ in range(5000)])
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[4:200] = bytes(196)
    (tmp_path / "a.parquet").write_bytes(content)
    texts, bad = read(path=str(tmp_path))
    assert len(bad.records) == 1 and "a.parquet" in bad.records[0][0] and len(texts) < 5000


# --------------------------------------------------------------------------------------------- unusable sources


def test_unusable_sources(tmp_path):
    (tmp_path / "a.bin").write_text("x")
    for config, part in (
        ({"path": str(tmp_path / "none")}, "does not exist"),
        ({"path": str(tmp_path)}, "no file below"),
        ({"path": str(tmp_path / "*.txt")}, "no file matches"),
        ({}, "exactly one"),
        ({"path": "a", "name": "b"}, "exactly one"),
    ):
        with pytest.raises(UserError, match=part) as caught:
            open_source(SourceConfig(**config), "data.sources.7")
        assert "data.sources.7" in str(caught.value)


def test_mixed_folder_needs_a_format(tmp_path):
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "one"}))
    with pytest.raises(UserError, match=r"1 jsonl, 1 text.*set format"):
        read(path=str(tmp_path))
    assert read(path=str(tmp_path), format="jsonl")[0] == ["one"]
    assert read(path=str(tmp_path), format="text")[0] == ["about"]
