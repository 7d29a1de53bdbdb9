"""Cutting a batch into shards, documents and windows: against loops over single tokens."""

from __future__ import annotations

import pytest
import torch
from distributed import SEQ_LEN, batch

from linearard.layout import (
    cut,
    positions_of,
    relation_segment_ids,
    segments_of,
    whole_sequence,
)
from linearard.parallel import ParallelContext

CPU = torch.device("cpu")


def _context(rank: int, size: int, world_size: int | None = None) -> ParallelContext:
    return ParallelContext(rank, world_size or size, rank, CPU, size, None)


def _ids(seed: int, rows: int = 3, length: int = 40) -> torch.Tensor:
    """Runs of random lengths; an id may come back after another one, and padding may be anywhere."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(rows, length, generator=generator) < 0.85
    fresh = torch.randint(-1, 3, (rows, length), generator=generator)
    ids = fresh.clone()
    for row in range(rows):
        for i in range(1, length):
            if keep[row, i]:
                ids[row, i] = ids[row, i - 1]
    return ids


def _slow_runs(ids: torch.Tensor) -> list[tuple[int, int, int]]:
    """(row, start, end) of maximal stretches of equal ids."""
    runs = []
    for row, values in enumerate(ids.tolist()):
        start = 0
        for i in range(1, len(values) + 1):
            if i == len(values) or values[i] != values[start]:
                runs.append((row, start, i))
                start = i
    return runs


def _slow_pieces(segment_ids: torch.Tensor, window: int) -> list[list[int]]:
    """Number of each token's piece (document x window) in its row, -1 for padding."""
    result = []
    for values in segment_ids.tolist():
        numbers, piece = [], -1
        for i, value in enumerate(values):
            if i == 0 or value != values[i - 1] or i % window == 0:
                piece += 1
            numbers.append(piece if value >= 0 else -1)
        result.append(numbers)
    return result


@pytest.mark.parametrize("seed", range(4))
def test_segments_are_the_runs(seed: int) -> None:
    ids = _ids(seed)
    segments, runs, length = segments_of(ids, CPU), _slow_runs(ids), ids.shape[1]
    assert segments.cu_seqlens == (*(row * length + start for row, start, _ in runs), ids.numel())
    assert segments.device_cu_seqlens.tolist() == list(segments.cu_seqlens)
    assert segments.device_cu_seqlens.dtype == torch.int32
    assert segments.max_length == max(end - start for _, start, end in runs)
    assert segments.uniform_length is None


@pytest.mark.parametrize(("runs", "expected"), [([8, 8, 8], 8), ([24], 24), ([8, 8, 7, 1], None), ([7, 17], None)])
def test_uniform_length(runs: list[int], expected: int | None) -> None:
    row = torch.cat([torch.full((n,), i) for i, n in enumerate(runs)])
    assert segments_of(torch.stack([row, row + 5]), CPU).uniform_length == expected


@pytest.mark.parametrize("seed", range(4))
def test_positions_restart_at_each_run(seed: int) -> None:
    ids = _ids(seed)
    expected = torch.empty_like(ids)
    for row, start, end in _slow_runs(ids):
        expected[row, start:end] = torch.arange(end - start)
    assert torch.equal(positions_of(ids), expected)


@pytest.mark.parametrize("window", [1, 7, 16, 40, 64])
def test_pieces_are_document_by_window(window: int) -> None:
    for seed in range(3):
        ids = _ids(seed)
        pieces = relation_segment_ids(ids, window)
        assert pieces.dtype == torch.int32
        assert pieces.tolist() == _slow_pieces(ids, window)


@pytest.mark.parametrize(("size", "window", "local"), [(1, 16, True), (2, 16, True), (4, 16, False), (2, 24, False)])
def test_the_shards_of_a_cut_batch_join_to_the_whole(size: int, window: int, local: bool) -> None:
    whole = batch(torch.Generator().manual_seed(3), 2)
    cuts = [cut(whole, window, local, False, _context(rank, size)) for rank in range(size)]
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(torch.cat([getattr(c, name) for c in cuts], 1), whole[name]), name
    pieces = torch.tensor(_slow_pieces(whole["segment_ids"], window), dtype=torch.int32)
    positions = torch.empty_like(whole["input_ids"])
    for row, start, end in _slow_runs(pieces):
        positions[row, start:end] = torch.arange(end - start)
    assert sum(c.relation_rows for c in cuts) == int((pieces >= 0).sum())
    assert sum(c.label_count for c in cuts) == int((whole["labels"] >= 0).sum())
    for rank, found in enumerate(cuts):
        shard = slice(rank * SEQ_LEN // size, (rank + 1) * SEQ_LEN // size)
        rows = (-1, window) if local else (2, SEQ_LEN // size)
        assert torch.equal(found.teacher_input_ids, whole["input_ids"][:, shard].reshape(rows))
        assert torch.equal(found.teacher_position_ids, positions[:, shard].reshape(rows))
        assert torch.equal(found.relation_segment_ids, pieces[:, shard] if local else pieces)
        seen = pieces[:, shard].reshape(rows) if local else pieces
        assert found.teacher_segments.cu_seqlens == segments_of(seen, CPU).cu_seqlens
        assert found.segments.cu_seqlens == segments_of(whole["segment_ids"], CPU).cu_seqlens
        assert found.local_windows is local


def test_whole_sequence_is_one_segment_a_row() -> None:
    ids = torch.randint(0, 9, (2, 12))
    input_ids, position_ids, segments = whole_sequence(ids, CPU)
    assert torch.equal(input_ids, ids)
    assert position_ids.tolist() == [list(range(12))] * 2
    assert segments.cu_seqlens == (0, 12, 24)


def test_ranks_of_a_sequence_parallel_group_are_neighbours() -> None:
    places = [_context(rank, 2, 4) for rank in range(4)]
    assert [c.sequence_parallel_rank for c in places] == [0, 1, 0, 1]
    assert [c.data_parallel_rank for c in places] == [0, 0, 1, 1]
    assert {c.data_parallel_size for c in places} == {2}
    tensor = torch.arange(16).reshape(1, 8, 2)
    assert torch.equal(torch.cat([c.shard(tensor) for c in places[:2]], 1), tensor)
