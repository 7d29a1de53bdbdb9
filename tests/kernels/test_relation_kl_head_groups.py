"""Heads in several groups, two at a time: which, in what order, the same results as all at once, less memory."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import relation_kl as rk
import torch
import torch.distributed as dist
from relation_kl import chunk_plan, torch_visit
from relation_kl.chunk_plan import head_groups
from relation_kl.head_group import take_turns
from relation_kl_checks import Alive
from test_relation_kl_group import check, on_gpus, spawn


@pytest.mark.parametrize(
    "heads, key_heads, batch, rows, groups, each",
    [
        (32, 32, 1, 2**15, 8, {4}),  # 128K tokens on 2 ranks
        (32, 32, 1, 2**14, 8, {4}),  # and on 4: shorter visits, for as many groups
        (32, 32, 1, 2**13, 1, {32}),  # two groups would take no less memory
        (32, 32, 1, 12288, 4, {8}),
        (32, 32, 1, 2**17, 32, {1}),
        (32, 8, 1, 2**15, 8, {1}),
        (32, 32, 4, 2**15, 32, {1}),
        (32, 32, 1, 2**14 - 128, 6, {5, 6}),  # 7 would not go two at a time
        (12, 12, 1, 2**15, 8, {1, 2}),
        (16, 16, 1, 2**15, 8, {2}),
        (10, 10, 1, 2**16, 10, {1}),
        (28, 4, 1, 2**14, 4, {1}),
        (7, 7, 1, 2**14, 1, {7}),
        (4, 1, 1, 9, 1, {1}),
    ],
)
def test_groups_have_long_visits_and_are_of_about_a_size(
    heads: int, key_heads: int, batch: int, rows: int, groups: int, each: set[int]
) -> None:
    found = head_groups(heads, key_heads, batch, rows)
    assert len(found) == groups
    assert {k.stop - k.start for _, k in found} == each
    forward = head_groups(heads, key_heads, batch, rows, forward=True)
    assert len(forward) == (groups // 2 if groups > 1 else 1)
    for parts in (found, forward):
        assert [i for q, _ in parts for i in range(heads)[q]] == list(range(heads))
        assert [i for _, k in parts for i in range(key_heads)[k]] == list(range(key_heads))
        shared = heads // key_heads
        assert all((q.start, q.stop) == (k.start * shared, k.stop * shared) for q, k in parts)


@pytest.mark.parametrize(
    "heads, key_heads, rows, groups, most",
    [
        (32, 32, 2**14, 16, 2),
        (32, 32, 2**13, 12, 3),
        (32, 32, 2**12, 2, 16),
        (32, 32, 2**8, 1, 32),
        (32, 8, 2**13, 8, 1),
        (7, 7, 2**14, 6, 2),
    ],
)
def test_captured_groups_are_smaller(heads: int, key_heads: int, rows: int, groups: int, most: int) -> None:
    """Two groups are under way, each in 9 chunks of half a shard: with 3 of 32 heads these are 2 * 9 / 2 * 3 / 32, or
    27 / 32, of a rank's share of one GPU's gradient in float32."""
    found = head_groups(heads, key_heads, 1, rows, captured=True)
    assert len(found) == groups and max(k.stop - k.start for _, k in found) == most
    assert [i for _, k in found for i in range(key_heads)[k]] == list(range(key_heads))


def _pieces(count: int, log: list[str]) -> list[Iterator[None]]:
    def piece(name: str) -> Iterator[None]:
        for i in range(2):
            log.append(f"{name}{i}")
            yield
        log.append(f"{name}2")

    return [piece("abcde"[i]) for i in range(count)]


@pytest.mark.parametrize(
    "count, order",
    [
        (1, "a0 a1 a2"),
        (2, "a0 a1 b0 b1 a2 b2"),
        # The third's rows are on their way before the second computes.
        (3, "a0 a1 b0 b1 a2 c0 b2 c1 c2"),
        (5, "a0 a1 b0 b1 a2 c0 b2 d0 c1 d1 c2 e0 d2 e1 e2"),
    ],
)
def test_pieces_take_turns(count: int, order: str) -> None:
    log: list[str] = []
    take_turns(_pieces(count, log))
    assert log == order.split()


def _in_groups(pairs: int) -> None:
    """Groups as small as visits of that many pairs of tiles allow, also if there are but two."""
    chunk_plan._LONG_VISIT, chunk_plan._LEAST_GROUPS = pairs, 2
    chunk_plan._CAPTURED_VISIT, chunk_plan._CAPTURED_GROUPS = pairs, 2**10


def many_groups() -> None:
    """One head a group, and two, against the whole and against all heads at once."""
    rank, ranks, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    for pairs in (1, 4):  # a batch of 2 and a pair of tiles: groups of 1 and of 2 of the 4 heads
        _in_groups(pairs)
        for key_heads in (None, 2):
            for kind in ("one", "crossing", "documents", "right"):
                check(rank, ranks, group, torch.float32, key_heads, 9, kind, "torch")
    _in_groups(1)
    if ranks == 2 and importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
        check(rank, ranks, group, torch.float16, None, 9, "crossing", "triton")
    torch.manual_seed(rank)
    q, q_t, k, k_t = (torch.randn(2, heads, 8, 8) for heads in (6, 6, 3, 3))
    ids = (torch.arange(8)[None] + 8 * rank).expand(2, -1) // 5
    grad = torch.randn(2, 6, 8)
    found = []
    for pairs in (512, 1):  # 1 group and 2, of one key head and of two
        _in_groups(pairs)
        leaves = [x.clone().requires_grad_() for x in (q, k)]
        rows = rk.attention_kl(*leaves, q_t, k_t, segment_ids=ids, group=group, backend="torch")
        apart = [rows.detach(), *torch.autograd.grad(rows, leaves, grad)]
        at_once = rk.attention_kl_value_and_grad(q, k, q_t, k_t, grad, segment_ids=ids, group=group, backend="torch")
        found.append([*apart, *at_once, *rk.relation_kl_value_and_grad(q, q_t, grad, group=group, backend="torch")])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ranks", [2, 3])
def test_groups_of_heads_give_the_same(ranks: int, tmp_path: Path) -> None:
    spawn(ranks, many_groups, tmp_path)


def count_bytes() -> None:
    """Chunks and gradients that are alive at once, for one group of heads and for eight."""
    x, upstream = torch.randn(1, 8, 32, 64), torch.ones(1, 8, 32)
    y, peaks = x.flip(2), []
    for pairs in (512, 1):
        _in_groups(pairs)
        # What a head has of a chunk is more than all heads have of numbers of rows.
        with Alive(x.nbytes // 16, x, y) as alive, alive.but_in(torch_visit, "forward", "backward", "own_logits"):
            rk.relation_kl_value_and_grad(x, y, upstream, group=dist.group.WORLD, backend="torch")
        peaks.append(alive.most - x.nbytes)  # the returned gradient
    assert peaks[1] <= 2 / 8 * peaks[0], peaks


@pytest.mark.parametrize("ranks", [2, 3])
def test_memory_is_that_of_two_groups(ranks: int, tmp_path: Path) -> None:
    spawn(ranks, count_bytes, tmp_path)


def groups_on_gpus(dtype: torch.dtype, key_heads: int | None) -> None:
    """One head a group, by the kernels; shards of whole tiles and others."""
    rank, ranks, device = dist.get_rank(), dist.get_world_size(), torch.device("cuda", dist.get_rank())
    _in_groups(1)
    for shard, dim in ((9, 64), (300, 128), (512, 128)):
        for kind in ("one", "crossing", "documents"):
            check(rank, ranks, dist.group.WORLD, dtype, key_heads, shard, kind, "triton", dim, device)


@on_gpus
def test_groups_on_gpus(dtype: torch.dtype, key_heads: int | None, tmp_path: Path) -> None:
    spawn(torch.cuda.device_count(), groups_on_gpus, tmp_path, dtype, key_heads)
