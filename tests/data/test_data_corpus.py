"""The cache: built once, whole or not at all, keyed by content and settings; the split is disjoint and stable."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal

import numpy as np
import pytest

from linearard.config import DataConfig, SourceConfig
from linearard.data import Corpus, prepare
from linearard.data.corpus import _held_out
from linearard.errors import UserError

BOS, EOS = 1, 2


@pytest.fixture
def tree(tmp_path):
    folder = tmp_path / "tree"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02}.txt").write_text(f"document {i} " * (i % 7 + 1))
    return folder


def config(tree, tmp_path, **settings):
    source = {"path": str(tree), **settings.pop("source", {})}
    return DataConfig(
        sources=(SourceConfig(**source),), cache_dir=str(tmp_path / "cache"),
        **{"seq_len": 16, "held_out_fraction": 0.2, **settings},
    )  # fmt: skip


def caches(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").iterdir() if path.is_dir())


def text_of(documents, index) -> str:
    ids = documents.tokens(index).astype(int)
    return bytes(i - 10 for i in ids if i >= 10).decode()


def test_tokens_and_report(tree, tmp_path, byte_tokenizer):
    (tree / "x_empty.txt").write_text("\n")
    (tree / "x_bad.txt").write_bytes(b"\xff")
    (tree / "x_short.txt").write_text("a")
    corpus = prepare(
        config(tree, tmp_path, max_bad_records=1, min_document_tokens=4, add_eos=True),
        byte_tokenizer,
        "t",
        progress=False,
    )
    report = corpus.report
    assert (report.documents, report.empty_documents, report.short_documents) == (40, 1, 1)
    assert report.skipped == ((str(tree / "x_bad.txt"), "not UTF-8 at byte 0"),)
    assert report.train_documents == len(corpus.train) and report.held_out_documents == len(corpus.held_out) > 0
    assert report.tokens == corpus.train.total_tokens + corpus.held_out.total_tokens
    expected = sorted(path.read_text() for path in tree.glob("[0-9]*.txt"))
    found = [text_of(side, i) for side in (corpus.train, corpus.held_out) for i in range(len(side))]
    assert sorted(found) == expected
    for side in (corpus.train, corpus.held_out):
        for i in range(len(side)):
            ids = side.tokens(i)
            assert ids[0] == BOS and ids[-1] == EOS and len(ids) == side.lengths[i] == len(text_of(side, i)) + 2
    assert "40 documents" in report.describe() and "1 unreadable" in report.describe()


def test_second_run_reads_the_cache(tree, tmp_path, byte_tokenizer):
    first = prepare(config(tree, tmp_path), byte_tokenizer, "t", progress=False)
    calls = byte_tokenizer.calls
    second = prepare(config(tree, tmp_path), None, "t", progress=False)
    assert byte_tokenizer.calls == calls and second.key == first.key and second.report == first.report
    assert isinstance(second.train.tokens_array, np.memmap)
    np.testing.assert_array_equal(first.train.tokens_array, second.train.tokens_array)
    np.testing.assert_array_equal(first.held_out.starts, second.held_out.starts)


def test_changed_content_or_settings_give_a_new_cache(tree, tmp_path, byte_tokenizer):
    keys = []

    def key(fingerprint="t", **settings):
        keys.append(prepare(config(tree, tmp_path, **settings), byte_tokenizer, fingerprint, progress=False).key)

    key()
    key("another tokenizer")
    key(add_bos=False)
    key(add_eos=True)
    key(held_out_fraction=0.3)
    key(min_document_tokens=30)
    key(source={"max_documents": 10})
    key(source={"role": "train"})
    (tree / "00.txt").write_text("Document 0 ")  # as long as before
    key()
    (tree / "new.txt").write_text("one more")
    key()
    assert len(set(keys)) == len(keys) == len(caches(tmp_path))
    key(seq_len=32, packing="stream", shuffle=False)  # of no account to the tokens
    assert keys[-1] == keys[-2]


def test_a_moved_tree_keeps_its_cache(tree, tmp_path, byte_tokenizer):
    first = prepare(config(tree, tmp_path), byte_tokenizer, "t", progress=False)
    moved = tree.rename(tmp_path / "moved")
    assert prepare(config(moved, tmp_path), None, "t", progress=False).key == first.key


def test_strict_limit_is_not_undone_by_the_cache(tree, tmp_path, byte_tokenizer):
    (tree / "bad.txt").write_bytes(b"\xff")
    prepare(config(tree, tmp_path, max_bad_records=5), byte_tokenizer, "t", progress=False)
    with pytest.raises(UserError, match=r"bad\.txt"):
        prepare(config(tree, tmp_path), byte_tokenizer, "t", progress=False)


@pytest.mark.parametrize(("vocabulary", "dtype"), [(65536, np.uint16), (65537, np.uint32)])
def test_token_width(tree, tmp_path, make_byte_tokenizer, vocabulary, dtype):
    corpus = prepare(config(tree, tmp_path), make_byte_tokenizer(vocabulary), "t", progress=False)
    assert corpus.train.tokens_array.dtype == dtype


def test_too_little_data(tree, tmp_path, byte_tokenizer):
    with pytest.raises(UserError, match=r"tokens to train on .*data\.seq_len 1,000,000"):
        prepare(config(tree, tmp_path, seq_len=1_000_000), byte_tokenizer, "t", progress=False)


def test_nothing_but_empty_documents(tmp_path, byte_tokenizer):
    folder = tmp_path / "tree"
    folder.mkdir()
    (folder / "a.txt").write_text(" ")
    with pytest.raises(UserError, match="0 tokens to train on"):
        prepare(config(folder, tmp_path), byte_tokenizer, "t", progress=False)


# ------------------------------------------------------------------------------------- interruption, concurrency


def _run(target, *arguments) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


def test_a_killed_process_leaves_no_cache(tree, tmp_path, make_byte_tokenizer):
    tokenizer = make_byte_tokenizer()
    settings = config(tree, tmp_path)

    class Deadly(make_byte_tokenizer):
        def __call__(self, texts, **kwargs):
            (building,) = (tmp_path / "cache").glob(".building-*")
            assert (building / "tokens.bin").exists()
            os.kill(os.getpid(), signal.SIGKILL)

    process = _run(lambda: prepare(settings, Deadly(), "t", progress=False))
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    (left,) = caches(tmp_path)
    assert left.startswith(".building-")
    corpus = prepare(settings, tokenizer, "t", progress=False)
    assert corpus.report.documents == 40

    # The remains are swept up once they are a day old.
    for path in (tmp_path / "cache" / left, *(tmp_path / "cache" / left).iterdir()):
        os.utime(path, (0, 0))
    prepare(settings, tokenizer, "another", progress=False)
    assert left not in caches(tmp_path) and len(caches(tmp_path)) == 2


def test_an_error_while_building_leaves_nothing(tree, tmp_path, make_byte_tokenizer):
    class Failing(make_byte_tokenizer):
        def __call__(self, texts, **kwargs):
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        prepare(config(tree, tmp_path), Failing(), "t", progress=False)
    assert caches(tmp_path) == []


def test_two_processes_at_once(tree, tmp_path, make_byte_tokenizer):
    settings = config(tree, tmp_path)
    meeting = multiprocessing.get_context("fork").Barrier(2)

    class Waiting(make_byte_tokenizer):
        def __call__(self, texts, **kwargs):
            meeting.wait(20)  # both are building now
            return super().__call__(texts, **kwargs)

    processes = [_run(lambda: prepare(settings, Waiting(), "t", progress=False)) for _ in range(2)]
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0]
    corpus = prepare(settings, None, "t", progress=False)
    assert caches(tmp_path) == [corpus.key] and corpus.report.documents == 40


def test_damaged_cache_is_named(tree, tmp_path, byte_tokenizer):
    corpus = prepare(config(tree, tmp_path), byte_tokenizer, "t", progress=False)
    folder = tmp_path / "cache" / corpus.key
    with open(folder / "tokens.bin", "r+b") as file:
        file.truncate(10)
    with pytest.raises(UserError, match=r"damaged.*delete it"):
        Corpus(folder)
    (folder / "report.json").write_text("{")
    with pytest.raises(UserError, match=r"damaged.*delete it"):
        prepare(config(tree, tmp_path), byte_tokenizer, "t", progress=False)


# ------------------------------------------------------------------------------------------------- the split


def sides(corpus):
    return tuple({text_of(side, i) for i in range(len(side))} for side in (corpus.train, corpus.held_out))


def test_split_is_disjoint_and_stable(tmp_path, byte_tokenizer):
    path = tmp_path / "a.jsonl"

    def write(numbers):
        path.write_text("".join(json.dumps({"text": f"text number {n}"}) + "\n" for n in numbers))
        return sides(prepare(config(path, tmp_path), byte_tokenizer, "t", progress=False))

    train, held_out = write(range(200))
    assert not train & held_out and len(train) + len(held_out) == 200 and 20 <= len(held_out) <= 60
    more_train, more_held_out = write([*range(500, 600), *reversed(range(200))])
    assert train <= more_train and held_out <= more_held_out


def test_roles(tree, tmp_path, byte_tokenizer):
    other = tmp_path / "other"
    other.mkdir()
    (other / "test.txt").write_text("only to be tested on")
    settings = DataConfig(
        sources=(SourceConfig(path=str(tree), role="train"), SourceConfig(path=str(other), role="held_out")),
        seq_len=16,
        cache_dir=str(tmp_path / "cache"),
        held_out_fraction=0.5,
    )
    corpus = prepare(settings, byte_tokenizer, "t", progress=False)
    assert len(corpus.train) == 40 and sides(corpus)[1] == {"only to be tested on"}
    assert corpus.report.source_documents == (40, 1)


def test_small_corpora_still_hold_something_out():
    identities = np.arange(2**63, 2**63 + 5, dtype=np.uint64)
    both = np.asarray(["both"] * 5)
    assert _held_out(identities, both, 1e-9).tolist() == [True, False, False, False, False]
    assert not _held_out(identities, both, 0.0).any()
    assert not _held_out(identities[:1], both[:1], 0.02).any()  # one document: to train on
    assert not _held_out(identities, np.asarray(["train"] * 5), 0.5).any()
