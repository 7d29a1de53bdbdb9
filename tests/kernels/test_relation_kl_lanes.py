"""Heads in several groups, two at a time: which, in what order, the same results as all at once, less memory."""

from __future__ import annotations

import importlib.util
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import relation_kl as rk
import torch
import torch.distributed as dist
from relation_kl import chunk_plan, lanes
from relation_kl.chunk_plan import head_groups
from relation_kl.lanes import take_turns
from test_relation_kl_group import check, spawn
from torch import Tensor


@pytest.mark.parametrize(
    "heads, key_heads, batch, rows, groups, each",
    [
        (32, 32, 1, 2**15, 8, (4, 4)),  # 128K tokens on 2 ranks
        (32, 32, 1, 2**14, 1, (32, 32)),  # and on 4: two groups would take no less memory
        (32, 32, 1, 2**17, 32, (1, 1)),
        (32, 8, 1, 2**15, 8, (4, 1)),
        (32, 32, 4, 2**15, 32, (1, 1)),
        (32, 32, 1, 2**14 + 1, 1, (32, 32)),
        (12, 12, 1, 2**15, 1, (12, 12)),
        (16, 16, 1, 2**15, 4, (4, 4)),
        (10, 10, 1, 2**16, 10, (1, 1)),
        (7, 7, 1, 2**14, 1, (7, 7)),
        (4, 1, 1, 9, 1, (4, 1)),
    ],
)
def test_groups_have_long_visits_and_are_all_of_a_size(
    heads: int, key_heads: int, batch: int, rows: int, groups: int, each: tuple[int, int]
) -> None:
    found = head_groups(heads, key_heads, batch, rows)
    assert len(found) == groups
    assert {(q.stop - q.start, k.stop - k.start) for q, k in found} == {each}
    assert [i for q, _ in found for i in range(heads)[q]] == list(range(heads))
    assert [i for _, k in found for i in range(key_heads)[k]] == list(range(key_heads))


def _pieces(count: int, yields: int, log: list[str]) -> list[Iterator[None]]:
    def piece(name: str) -> Iterator[None]:
        for i in range(yields):
            log.append(f"{name}{i}")
            yield
        log.append(f"{name}{yields}")

    return [piece("abcde"[i]) for i in range(count)]


def test_pieces_take_turns() -> None:
    cpu, log = torch.device("cpu"), []
    take_turns(_pieces(1, 2, log), cpu, 2)
    assert log == ["a0", "a1", "a2"]
    log.clear()
    take_turns(_pieces(3, 3, log), cpu, 2)
    assert log == ["a0", "a1", "b0", "a2", "b1", "a3", "c0", "b2", "c1", "b3", "c2", "c3"]
    for count, lead in ((2, 9), (5, 1)):  # also where the first is done before the second begins
        log.clear()
        take_turns(_pieces(count, 3, log), cpu, lead)
        assert sorted(log) == sorted(f"{name}{i}" for name in "abcde"[:count] for i in range(4))


def test_an_error_in_a_piece_is_the_caller_s() -> None:
    log: list[str] = []

    def broken() -> Iterator[None]:
        yield
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        take_turns([*_pieces(1, 3, log), broken()], torch.device("cpu"), 1)
    take_turns(_pieces(2, 1, log), torch.device("cpu"), 1)


def _in_groups(pairs: int) -> None:
    """Groups as small as visits of that many pairs of tiles allow, also if there are but two."""
    chunk_plan._VISIT_PAIRS, chunk_plan._LEAST_GROUPS = pairs, 2


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
    for pairs in (512, 1):  # 1 group and 3
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
    """Buffers of exchanges and gradients that are alive at once, for one group of heads and for eight."""
    x, upstream = torch.randn(1, 8, 32, 8), torch.ones(1, 8, 32)
    originals = torch.empty_like, torch.zeros
    peaks = []
    for pairs in (512, 1):
        made: list[tuple[weakref.ref[Tensor], int]] = []
        alive: list[int] = []

        def watching(function: Any, made: Any = made, alive: Any = alive) -> Any:
            def watched(*arguments: Any, **options: Any) -> Tensor:
                result = function(*arguments, **options)
                made.append((weakref.ref(result), result.nbytes))
                alive.append(sum(size for ref, size in made if ref() is not None))
                return result

            return watched

        _in_groups(pairs)
        torch.empty_like, torch.zeros = map(watching, originals)
        rk.relation_kl_value_and_grad(x, x.flip(2), upstream, group=dist.group.WORLD, backend="torch")
        torch.empty_like, torch.zeros = originals
        peaks.append(max(alive))
    assert peaks[1] <= 2 / 8 * peaks[0], peaks


@pytest.mark.parametrize("ranks", [2, 3])
def test_memory_is_that_of_two_groups(ranks: int, tmp_path: Path) -> None:
    spawn(ranks, count_bytes, tmp_path)


def groups_on_gpus() -> None:
    """One head a group, by the kernels; shards of whole tiles and others."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    _in_groups(1)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for key_heads in (None, 2):
            for shard, dim in ((9, 64), (300, 128), (512, 128)):
                for kind in ("one", "crossing", "documents"):
                    device = torch.device("cuda", rank)
                    check(rank, ranks, dist.group.WORLD, dtype, key_heads, shard, kind, "triton", dim, device)


def overwritten_on_gpus() -> None:
    """Lanes that lag behind, inputs overwritten and freed as soon as the host returns, calls right after each other."""
    rank, ranks, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    device = torch.device("cuda", rank)
    _in_groups(128)  # 64 pairs of tiles: groups of 2 of the 8 heads
    shard, calls = 2048, 6
    mine = slice(rank * shard, (rank + 1) * shard)
    shape = (1, 8, ranks * shard, 128)
    torch.manual_seed(0)
    wholes = [torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(calls)]
    want = []
    for x in wholes:
        y, g = x.flip(3), x[..., 0].float()
        want.append([z[:, :, mine].clone() for z in rk.relation_kl_value_and_grad(x, y, g, backend="triton")])
    side = torch.cuda.Stream(device)
    for apart in (False, True, False):
        got = []
        torch.cuda.synchronize()
        for i, whole in enumerate(wholes):
            caller = side if i % 3 == 2 else torch.cuda.default_stream(device)
            with torch.cuda.stream(caller):
                x = whole[:, :, mine].contiguous()
                y, g = x.flip(3), x[..., 0].float()
                for late, lane in enumerate(lanes._streams(device)):
                    with torch.cuda.stream(lane):
                        torch.cuda._sleep(10_000_000 * (1 + (late + rank + i) % 2))
                if apart:
                    leaf = x.detach().requires_grad_()
                    rows = rk.relation_kl(leaf, y, group=group, backend="triton")
                    results = [rows.detach().clone(), *torch.autograd.grad(rows, [leaf], g)]
                    del leaf, rows
                else:
                    results = list(rk.relation_kl_value_and_grad(x, y, g, group=group, backend="triton"))
                got.append([z.clone() for z in results])
                for z in (x, y, g, *results):
                    z.fill_(float("nan"))
                del x, y, g, results, z
                for _ in range(4):  # what was freed comes again, full of NaN
                    torch.full((1, 8, shard, 128), float("nan"), device=device)
        torch.cuda.synchronize()
        for i, (found, expected) in enumerate(zip(got, want, strict=True)):
            for a, b in zip(found, expected, strict=True):
                scale = float(b.float().abs().max())
                assert a.isfinite().all(), (apart, i)
                assert float((a.float() - b.float()).abs().max()) <= 2e-2 * scale, (apart, i)


@pytest.mark.gpu
@pytest.mark.parametrize("function", [groups_on_gpus, overwritten_on_gpus])
def test_groups_on_gpus(function: Any, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs; this machine has {torch.cuda.device_count()}")
    spawn(2, function, tmp_path)
