"""Packing: every token once, in order, with labels, positions and segments as a slow reference says."""

from __future__ import annotations

import numpy as np
import pytest

from linearard.data import Documents, PackedDataset, evaluation_windows
from linearard.data.packing import _best_fit_decreasing

T = 16


def unique_documents(lengths) -> Documents:
    """Documents whose tokens are all different: document by document 0, 1, 2, ..."""
    lengths = np.asarray(lengths, np.int64)
    return Documents(np.arange(lengths.sum(), dtype=np.uint32), np.cumsum(lengths) - lengths, lengths, "unique")


def random_lengths(seed: int, count: int = 120) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 4 * T, count)


def reference_fields(input_ids, segment_ids):
    """labels and position_ids, token by token from the definitions."""
    labels, positions = [], []
    for t in range(len(input_ids)):
        inside = segment_ids[t] >= 0
        follows = t + 1 < len(input_ids) and segment_ids[t + 1] == segment_ids[t]
        labels.append(int(input_ids[t + 1]) if inside and follows else -100)
        starts = t == 0 or segment_ids[t - 1] != segment_ids[t]
        positions.append(0 if starts or not inside else positions[-1] + 1)
    return labels, positions


@pytest.mark.parametrize("packing", ["documents", "stream"])
@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_conservation_and_fields(packing, seed):
    documents = unique_documents(random_lengths(seed or 7))
    dataset = PackedDataset(documents, T, packing, seed)
    seen = []
    for i in range(len(dataset)):
        item = dataset[i]
        assert all(value.dtype == np.int64 and value.shape == (T,) for value in item.values())
        ids, segments = item["input_ids"], item["segment_ids"]
        real = segments >= 0
        assert real.any() and not np.any(np.diff(real.astype(int)) > 0)  # padding at the end only
        assert sorted(set(segments[real])) == list(range(segments.max() + 1)) and np.all(np.diff(segments[real]) >= 0)
        labels, positions = reference_fields(ids, segments)
        assert item["labels"].tolist() == labels and item["position_ids"].tolist() == positions
        seen.append(ids[real])
    tokens = np.concatenate(seen)
    np.testing.assert_array_equal(np.sort(tokens), np.arange(documents.total_tokens))
    assert dataset.padding_fraction == pytest.approx(1 - documents.total_tokens / (len(dataset) * T))


@pytest.mark.parametrize("seed", [None, 3])
def test_each_piece_is_a_segment_of_one_document(seed):
    documents = unique_documents(random_lengths(5))
    dataset = PackedDataset(documents, T, "documents", seed)
    pieces = []
    for item in dataset:
        for segment in range(item["segment_ids"].max() + 1):
            ids = item["input_ids"][item["segment_ids"] == segment]
            np.testing.assert_array_equal(np.diff(ids), 1)
            pieces.append((int(ids[0]), len(ids)))
    expected = [
        (int(start) + at, min(T, int(length) - at))
        for start, length in zip(documents.starts, documents.lengths, strict=True)
        for at in range(0, int(length), T)
    ]
    assert sorted(pieces) == sorted(expected)


def test_stream_joins_documents_in_order():
    dataset = PackedDataset(unique_documents([5, 40, 1, 10]), T, "stream")
    assert len(dataset) == 4
    joined = np.concatenate([item["input_ids"][item["segment_ids"] == 0] for item in dataset])
    np.testing.assert_array_equal(joined, np.arange(56))
    assert dataset[0]["labels"].tolist() == [*range(1, 16), -100]  # across documents, not across sequences
    assert dataset[3]["segment_ids"].tolist() == [0] * 8 + [-1] * 8
    many = unique_documents(random_lengths(1))
    shuffled, other = (PackedDataset(many, T, "stream", seed=seed) for seed in (1, 2))
    assert not np.array_equal(shuffled[0]["input_ids"], other[0]["input_ids"])


def test_packing_is_deterministic():
    lengths = random_lengths(9)
    for seed in (None, 4):
        first, second = (PackedDataset(unique_documents(lengths), T, "documents", seed) for _ in range(2))
        assert all(np.array_equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, second, strict=True))


def naive_best_fit_decreasing(lengths, capacity) -> list[int]:
    """Free room of each bin, by trying every bin for every piece."""
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, left in enumerate(room) if left >= length]
        if fitting:
            room[min(fitting, key=lambda i: room[i])] -= length
        else:
            room.append(capacity - length)
    return sorted(room)


@pytest.mark.parametrize("seed", range(8))
def test_best_fit_decreasing_equals_the_naive_one(seed):
    generator = np.random.default_rng(seed)
    capacity = int(generator.integers(5, 60))
    lengths = generator.integers(1, capacity + 1, 200)
    bins = _best_fit_decreasing(lengths, capacity)
    fill = np.bincount(bins, weights=lengths).astype(int)
    assert sorted((capacity - fill).tolist()) == naive_best_fit_decreasing(lengths.tolist(), capacity)
    first = [bins.tolist().index(b) for b in range(bins.max() + 1)]
    assert first == sorted(first)


def test_short_documents_leave_little_padding():
    lengths = np.random.default_rng(0).integers(10, 3000, 20_000)
    assert PackedDataset(unique_documents(lengths), 4096).padding_fraction < 0.001


@pytest.mark.parametrize("packing", ["documents", "stream"])
def test_edges(packing):
    assert len(PackedDataset(unique_documents([]), T, packing)) == 0
    assert PackedDataset(unique_documents([]), T, packing).padding_fraction == 0
    exact = PackedDataset(unique_documents([T, 2 * T]), T, packing)
    assert len(exact) == 3 and exact.padding_fraction == 0
    with pytest.raises(IndexError):
        exact[3]
    one = PackedDataset(unique_documents([1]), T, packing)[0]
    assert one["labels"].tolist() == [-100] * T and one["segment_ids"].tolist() == [0] + [-1] * (T - 1)
    with pytest.raises(ValueError, match="packing"):
        PackedDataset(unique_documents([1]), T, "loose")


def test_evaluation_windows():
    documents = unique_documents([40, 8, 15, 16, 33, 1])
    firsts = [w[0] for w in evaluation_windows(documents, T, 100)]
    assert firsts == [0, 63, 79, 16, 95]  # first windows of long documents, then their second windows
    assert all(w.dtype == np.int64 and len(w) == T for w in evaluation_windows(documents, T, 100))
    assert [w[0] for w in evaluation_windows(documents, T, 2)] == [0, 63]
    short = evaluation_windows(documents, T, 100, allow_short=True)
    assert [len(w) for w in short] == [16, 8, 15, 16, 16, 16, 16, 8]  # the last token of 33 alone is no window
    assert evaluation_windows(documents, 64, 100) == []
