"""The stream: disjoint over ranks, complete, and the same after a resume on any number of ranks."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from linearard.data import BatchStream, Documents, PackedDataset
from linearard.errors import UserError

T = 8


def dataset(sequences: int = 11, name: str = "a", seed: int | None = None) -> PackedDataset:
    """Sequences that begin with T * (their number)."""
    lengths = np.full(sequences, T)
    documents = Documents(np.arange(sequences * T, dtype=np.uint32), np.cumsum(lengths) - T, lengths, name)
    return PackedDataset(documents, T, seed=seed)


def numbers(batch) -> list[int]:
    return [int(row[0]) // T for row in batch["input_ids"]]


def run(size: int, micro: int, steps: int, state=None, seed: int = 5) -> tuple[list[int], list[dict]]:
    """Sequence numbers in global order, and each rank's final state."""
    streams = [BatchStream(dataset(), micro, rank, size, seed) for rank in range(size)]
    if state is not None:
        for stream in streams:
            stream.load_state_dict(state)
    order = [n for _ in range(steps) for stream in streams for n in numbers(stream.next_batch())]
    return order, [stream.state_dict() for stream in streams]


def test_batches():
    batch = BatchStream(dataset(), 3).next_batch()
    assert set(batch) == {"input_ids", "labels", "segment_ids", "position_ids"}
    for value in batch.values():
        assert value.shape == (3, T) and value.dtype == torch.int64


@pytest.mark.parametrize(("size", "micro"), [(1, 1), (2, 1), (2, 2), (3, 4), (4, 5)])
def test_every_epoch_is_complete_whatever_the_batch(size, micro):
    order, states = run(size, micro, steps=40)
    for epoch in range(len(order) // 11):
        assert sorted(order[epoch * 11 : (epoch + 1) * 11]) == list(range(11))
    assert order == run(1, 1, steps=len(order))[0]  # ranks share one global order
    assert all(state == states[0] for state in states) and states[0]["samples"] == 40 * size * micro


def test_epochs_differ_and_seeds_differ():
    order, _ = run(1, 1, 33)
    assert order[:11] != order[11:22] != order[22:]
    assert order != run(1, 1, 33, seed=6)[0]
    plain = BatchStream(dataset(), 1, shuffle=False)
    assert [numbers(plain.next_batch())[0] for _ in range(22)] == [*range(11), *range(11)]


@pytest.mark.parametrize(("before", "after"), [((2, 2), (2, 2)), ((2, 2), (4, 1)), ((2, 1), (1, 3)), ((1, 5), (3, 2))])
def test_resume_on_another_number_of_ranks(before, after):
    first, states = run(*before, steps=7)
    saved = json.loads(json.dumps(states[0]))
    second, _ = run(*after, steps=9, state=saved)
    whole, _ = run(1, 1, steps=len(first) + len(second))
    assert first + second == whole


def test_state_of_another_stream_is_refused():
    state = BatchStream(dataset(), 1, seed=1).state_dict()
    for other, part in (
        (BatchStream(dataset(), 1, seed=2), "seed"),
        (BatchStream(dataset(), 1, seed=1, shuffle=False), "shuffle"),
        (BatchStream(dataset(name="b"), 1, seed=1), "documents"),
        (BatchStream(dataset(12), 1, seed=1), "sequences"),
        (BatchStream(dataset(seed=3), 1, seed=1), "packing_seed"),
    ):
        with pytest.raises(UserError, match=part):
            other.load_state_dict(state)


def test_arguments():
    with pytest.raises(ValueError, match="data_parallel_rank"):
        BatchStream(dataset(), 1, 2, 2)
    with pytest.raises(ValueError, match="micro_batch_size"):
        BatchStream(dataset(), 0)
    with pytest.raises(UserError, match="no sequence"):
        BatchStream(dataset(0), 1)
