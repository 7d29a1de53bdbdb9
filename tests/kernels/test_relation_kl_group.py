"""A sequence sharded over gloo ranks against the same sequence whole, in float64 and in the ranks' own precision."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import relation_kl as rk
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from other_order import gradients_in_another_order
from relation_kl import chunk_plan, exchanges, sequence_parallel, torch_backend, torch_visit
from relation_kl.torch_backend import Operands
from relation_kl_checks import LAYOUTS, Alive
from torch import Tensor


def spawn(ranks: int, function: Callable[..., None], folder: Path, *arguments: Any) -> None:
    mp.spawn(_process, (ranks, str(folder / "rendezvous"), function, arguments), nprocs=ranks)


def _process(rank: int, ranks: int, rendezvous: str, function: Callable[..., None], arguments: Any) -> None:
    torch.set_num_threads(1)
    wait = timedelta(seconds=60)
    kind = "gloo"
    if function.__name__.endswith("_on_gpus"):
        kind = "nccl"
        torch.cuda.set_device(rank)
    dist.init_process_group(kind, init_method=f"file://{rendezvous}", rank=rank, world_size=ranks, timeout=wait)
    try:
        function(*arguments)
    finally:
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may outlive their group, and abort a process whose interpreter is being finalized


def ids_of(kind: str, batch: int, length: int, shard: int) -> Tensor | None:
    index = torch.arange(length).expand(batch, -1)
    if kind == "one":
        return None
    if kind == "crossing":  # documents of uneven lengths, across the borders of shards
        return (index + 3) // (shard + 2)
    if kind == "windows":  # whole windows in every shard
        return index // shard
    if kind == "right":  # padding at the end of the last shard, another amount in each row
        return torch.where(index < length - 3 * torch.arange(batch)[:, None] - 2, 0, -1)
    if kind == "documents":
        return torch.randint(-1, 4, (batch, length)).sort(-1).values
    assert kind == "scattered", kind
    return torch.randint(-1, 3, (batch, length))


def check_all(dtypes: list[torch.dtype]) -> None:
    """Every case on the ranks of this group; fp32 to 1e-5 relative, bf16 as close as one process."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    for dtype in dtypes:
        for key_heads in (None, 2):
            for shard in (1, 9):
                # Few rows at a time where there are many.
                torch_backend._CPU_LOGITS = 100 if shard == 9 else 2**20
                for kind in ("one", "crossing", "windows", "right", "documents", "scattered"):
                    check(rank, ranks, group, dtype, key_heads, shard, kind, "torch")


def check_on_gpus(dtype: torch.dtype, key_heads: int | None) -> None:
    """Every kind on NCCL, by the kernels; shards of whole tiles and others."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank)
    for shard, dim in ((9, 64), (300, 128), (512, 128)):
        for kind in ("one", "crossing", "windows", "right", "documents", "scattered"):
            check(rank, ranks, dist.group.WORLD, dtype, key_heads, shard, kind, "triton", dim, device)
    for layout in LAYOUTS:
        check(rank, ranks, dist.group.WORLD, dtype, key_heads, 300, "crossing", "triton", 128, device, layout)


def check(
    rank: int,
    ranks: int,
    group: Any,
    dtype: torch.dtype,
    key_heads: int | None,
    shard: int,
    kind: str,
    backend: str,
    dim: int = 8,
    device: torch.device | None = None,
    layout: str | None = None,
) -> None:
    device = device or torch.device("cpu")
    lay = (lambda x: x) if layout is None else LAYOUTS[layout]
    torch.manual_seed(shard)
    batch, heads, length = 2, 4, ranks * shard
    ids = ids_of(kind, batch, length, shard)
    students = [torch.randn(batch, h, length, dim) for h in ((heads,) if key_heads is None else (heads, key_heads))]
    teachers = [x + 0.3 * torch.randn_like(x) for x in students]
    if ids is not None:
        padding = (ids < 0)[:, None, :, None]
        students = [x.masked_fill(padding, float("nan")) for x in students]
        teachers = [x.masked_fill(padding, float("inf")) for x in teachers]
    students, teachers = [x.to(device, dtype) for x in students], [x.to(device, dtype) for x in teachers]
    upstream = torch.randn(batch, length, heads).to(device).transpose(1, 2)
    ids = ids if ids is None else ids.to(device)
    mine = slice(rank * shard, (rank + 1) * shard)

    def run(cut: slice, kind_of: torch.dtype, function: Any, **options: Any) -> list[Tensor]:
        leaves = [lay(x[:, :, cut].to(kind_of)).requires_grad_() for x in students]
        rows = function(*leaves, *(lay(x[:, :, cut].to(kind_of)) for x in teachers), **options)
        return [rows.detach(), *torch.autograd.grad(rows, leaves, upstream[:, :, cut].to(rows.dtype))]

    name = "relation_kl" if key_heads is None else "attention_kl"
    shard_ids = None if ids is None else ids[:, mine]
    got = run(mine, dtype, getattr(rk, name), segment_ids=shard_ids, group=group, backend=backend)
    one = run(slice(None), dtype, getattr(rk, name), segment_ids=ids, backend="torch")
    truth = run(slice(None), torch.float64, getattr(rk.reference, name), segment_ids=ids)
    case = f"{name} {dtype} {kind} shard {shard} of {ranks}, key heads {key_heads}, rank {rank}, {layout}"
    on_cpu = device.type == "cpu"
    for a, b, c in zip(got, one, truth, strict=True):
        b, c = b[:, :, mine].double(), c[:, :, mine]
        scale = max(1.0, float(c.abs().max()))
        assert a.isfinite().all(), case
        if dtype == torch.float32:
            assert float((a - b).abs().max()) <= 1e-5 * scale, (case, float((a - b).abs().max()))
        error, budget = float((a - c).abs().max()), float((b - c).abs().max())
        # On a GPU `one` takes float32 products, and the kernels 16-bit ones.
        budget = 2 * budget if on_cpu or dtype == torch.float32 else 2 * budget + 2 * torch.finfo(dtype).eps * scale
        assert error <= budget + 2e-6 * scale, (case, error, budget)
    if key_heads is None:
        same = rk.relation_kl_value_and_grad(
            students[0][:, :, mine].nan_to_num(), students[0][:, :, mine].nan_to_num(), upstream[:, :, mine],
            segment_ids=shard_ids, group=group, backend=backend,
        )  # fmt: skip
        assert all((x == 0).all() for x in same), case


def buffers_in_another_order() -> None:
    """Exchanges add up and send gradients as they lie."""
    rank, ranks, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    with gradients_in_another_order():
        for dtype in (torch.float32, torch.float16):
            for key_heads in (None, 2):
                for kind in ("one", "crossing", "right"):
                    check(rank, ranks, group, dtype, key_heads, 9, kind, "torch")


def autocast_and_wide_gradients() -> None:
    """Neither changes anything; nor does a float64 upstream gradient on one rank only."""
    rank, group = dist.get_rank(), dist.group.WORLD
    torch.manual_seed(rank)
    x = torch.randn(1, 2, 16, 8)
    y, g = x + 0.3 * torch.randn_like(x), torch.randn(1, 2, 16)
    plain = rk.relation_kl_value_and_grad(x, y, g, group=group, backend="torch")
    with torch.autocast("cpu", torch.bfloat16):
        cast = rk.relation_kl_value_and_grad(x, y, g, group=group, backend="torch")
    wide = rk.relation_kl_value_and_grad(x, y, g.double() if rank else g, group=group, backend="torch")
    for a, b, c in zip(plain, cast, wide, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_autocast_and_the_type_of_the_upstream_gradient(tmp_path: Path) -> None:
    spawn(2, autocast_and_wide_gradients, tmp_path)


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_sharded_is_whole(ranks: int, tmp_path: Path) -> None:
    spawn(ranks, check_all, tmp_path, [torch.float32, torch.bfloat16] if ranks in (2, 4) else [torch.float32])


def check_in_triton() -> None:
    """The general kernels, on few cases: the interpreter is slow."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for dtype, key_heads, shard, kind in (
        (torch.float32, None, 70, "crossing"),
        (torch.float16, None, 9, "documents"),
        (torch.float32, 2, 9, "one"),
    ):
        check(rank, ranks, dist.group.WORLD, dtype, key_heads, shard, kind, "triton")
    for layout in LAYOUTS:
        check(rank, ranks, dist.group.WORLD, torch.float16, None, 9, "crossing", "triton", layout=layout)


@pytest.mark.skipif(torch.cuda.is_available(), reason="in Triton's interpreter only: the ranks have no GPU each")
def test_sharded_is_whole_in_triton(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="needs triton, which is not installed")
    spawn(2, check_in_triton, tmp_path)


def on_gpus(test: Callable[..., None]) -> Callable[..., None]:
    """A test over the GPUs of this machine, in several that have few kernels to compile each: they can run side by
    side, and no rank waits long for another one's."""
    found = torch.cuda.device_count()
    for mark in (
        pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32]),
        pytest.mark.parametrize("key_heads", [None, 2]),
        pytest.mark.skipif(found < 2, reason=f"needs two GPUs; this machine has {found}"),
        pytest.mark.gpu,
    ):
        test = mark(test)
    return test


@on_gpus
def test_sharded_is_whole_on_gpus(dtype: torch.dtype, key_heads: int | None, tmp_path: Path) -> None:
    spawn(torch.cuda.device_count(), check_on_gpus, tmp_path, dtype, key_heads)


def lying_anyhow() -> None:
    """Chunks are visited where they lie, and sent as if they lay side by side; on one rank otherwise than on others."""
    rank, ranks, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    names = list(LAYOUTS)
    for key_heads in (None, 2):
        for kind in ("one", "crossing"):
            for i in range(len(names)):
                layout = names[(i + rank) % len(names)]
                check(rank, ranks, group, torch.float32, key_heads, 9, kind, "torch", layout=layout)


@pytest.mark.parametrize("ranks", [2, 3])
def test_shards_may_lie_anyhow(ranks: int, tmp_path: Path) -> None:
    spawn(ranks, lying_anyhow, tmp_path)


def count_elements() -> None:
    """The largest tensor that any rank makes for what comes in, and what moves, by the plan; what is alive at once."""
    rank, ranks, shard = dist.get_rank(), dist.get_world_size(), 32
    x = torch.randn(1, 2, shard, 64, dtype=torch.bfloat16)
    y, g = x.flip(2), torch.ones(1, 2, shard)
    sizes: list[int] = []
    most: list[int] = []
    room = exchanges.room

    def counted(like: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        found = room(like, shape)
        sizes.append(found.numel())
        most.append(found.nbytes)
        return found

    exchanges.room = counted
    rk.relation_kl_value_and_grad(x, y, g, group=dist.group.WORLD, backend="torch")
    exchanges.room = room
    assert max(most) <= x.nbytes, (
        "a buffer is a chunk, half a shard, of student and teacher or of a gradient in float32"
    )
    # rows: one of two chunks is another rank's; keys: student and teacher, forward and backward, and their gradients
    assert sum(sizes) <= (2 * 5 + 5 * 2 * (ranks - 1)) * x.numel() // 2, (rank, sum(sizes))

    # In chunks, of student and teacher or of a gradient, not counting what has one number a row. In forward one chunk
    # is another rank's and the keys of two steps come in, four chunks at most, while a copy goes out. In backward: that
    # chunk, keys of two steps, gradients of the two that this rank computes, of the keys of two steps, and of a step's
    # that come in.
    chunk = x.nbytes
    parallel = sequence_parallel.SequenceParallel(dist.group.WORLD, torch_backend, torch_visit)
    operands = Operands(x, x, y, y, True)

    def alive_in(function: Callable[..., Any], *arguments: Any) -> float:
        with Alive(chunk // 2, x, y) as alive, alive.but_in(torch_visit, "forward", "backward", "own_logits"):
            found = function(operands, 1.0, None, *arguments)
        returned = x.nbytes if function != parallel.forward else 0
        del found
        return (alive.most - returned) / chunk

    *_, statistics = parallel.forward(operands, 1.0, None)
    found = [alive_in(parallel.forward), alive_in(parallel.backward, statistics, g)]
    found.append(alive_in(parallel.value_and_grad, g))
    bounds = {2: (3, 6, 6), 6: (6, 12, 12)}.get(ranks, (6, 13, 13))
    assert all(a <= b for a, b in zip(found, bounds, strict=True)), found


@pytest.mark.parametrize("ranks", [2, 6, 8])
def test_memory_is_that_of_a_shard(ranks: int, tmp_path: Path) -> None:
    spawn(ranks, count_elements, tmp_path)


@pytest.mark.parametrize("ranks", [2, 3])
def test_gradients_may_lie_in_any_order(ranks: int, tmp_path: Path) -> None:
    spawn(ranks, buffers_in_another_order, tmp_path)


@pytest.mark.parametrize("ranks", [2, 3, 4, 8, 16])
def test_work_is_balanced(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one segment no rank visits more than 1.1 times the average."""
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: ranks)
    monkeypatch.setattr(dist, "all_gather", lambda found, mine, group=None: [x.copy_(mine) for x in found])
    x = torch.empty(1, 1, 64, 8)
    plan = chunk_plan.make_plan(Operands(x, x, x, x, True), None, None)
    assert plan is not None
    assert sorted(c for rows in plan.rows for c in rows) == list(range(2 * ranks))
    work = [sum(sum(plan.sees[r]) - 0.5 for r in rows) for rows in plan.rows]
    assert max(work) <= 1.1 * sum(work) / ranks


@pytest.mark.parametrize(("ranks", "blocks"), [(2, 8), (3, 12), (4, 16), (8, 16)])
def test_nccl_has_blocks_for_each_rank(ranks: int, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In torch's words; a build without NCCL has none."""

    def options(*, is_high_priority_stream: bool) -> SimpleNamespace:
        return SimpleNamespace(is_high_priority_stream=is_high_priority_stream, config=SimpleNamespace())

    monkeypatch.setattr(dist, "ProcessGroupNCCL", SimpleNamespace(Options=options), raising=False)
    found: Any = rk.nccl_options(ranks)
    assert found.is_high_priority_stream and found.config.max_ctas == blocks


def test_no_rank_is_missing_from_the_first_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, where lengths are not compared: with an odd number of ranks one has no rows to send or to receive."""
    called: list[int] = []
    x = torch.empty(1, 1, 64, 8, device="meta")
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 0)
    monkeypatch.setattr(dist, "all_reduce", lambda *arguments, group=None: called.append(1))
    for ranks in (2, 3, 4, 5):
        monkeypatch.setattr(dist, "get_world_size", lambda group=None, ranks=ranks: ranks)
        called.clear()
        plan = chunk_plan.make_plan(Operands(x, x, x, x, True), None, None)
        assert plan is not None
        idle = [w for w, rows in enumerate(plan.rows) if sorted(rows) == [2 * w, 2 * w + 1]]
        assert bool(idle) == bool(called) == (ranks % 2 == 1)


def one_rank_dies() -> None:
    x = torch.randn(1, 2, 8, 8)
    if dist.get_rank() == 1:
        os._exit(3)
    began = time.monotonic()
    with pytest.raises(RuntimeError):
        rk.relation_kl(x, x, group=dist.group.WORLD, backend="torch")
    assert time.monotonic() - began < 60
    os._exit(0)


def test_a_dead_rank_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(mp.ProcessExitedException, match="exit code 3"):
        spawn(2, one_rank_dies, tmp_path)


class _Released(Exception):
    pass


def one_rank_hangs(folder: str) -> None:
    """Rank 1 lives, but comes to none of the exchanges, or leaves after a few; rank 0 has an error in time."""
    wait, x = 3.0, torch.randn(1, 2, 8, 8)
    start = exchanges.start
    for most in (None, 0, 1, 3):  # None: it does not even come to compare lengths
        group = dist.new_group(timeout=timedelta(seconds=wait))
        over = Path(folder) / f"over-{most}"
        came = 0

        def hang(over: Path = over) -> None:
            while not over.exists():
                time.sleep(0.05)
            raise _Released

        def counted(operations: Any, most: int | None = most, hang: Any = hang) -> Any:
            nonlocal came
            if came == most:
                hang()
            came += 1
            return start(operations)

        if dist.get_rank() == 1:
            exchanges.start = counted
            with pytest.raises(_Released):
                if most is None:
                    hang()
                rk.relation_kl_value_and_grad(x, x, x[..., 0], group=group, backend="torch")
            continue
        began = time.monotonic()
        with pytest.raises(RuntimeError):
            rk.relation_kl_value_and_grad(x, x, x[..., 0], group=group, backend="torch")
        took = time.monotonic() - began
        over.touch()
        assert wait - 1 < took < wait + 10, (most, took)
    os._exit(0)  # the groups that failed cannot be taken down in order


def test_a_hung_rank_is_an_error_within_the_time_out(tmp_path: Path) -> None:
    spawn(2, one_rank_hangs, tmp_path, str(tmp_path))


def unequal_lengths() -> None:
    length = 9 - dist.get_rank()
    x, ids = torch.randn(2, 2, length, 8), torch.zeros(2, length, dtype=torch.long)
    for segment_ids in (None, ids):
        with pytest.raises(ValueError, match="student has T = 9, 8, 7 on the ranks of group"):
            rk.relation_kl(x, x, segment_ids=segment_ids, group=dist.group.WORLD)
        with pytest.raises(ValueError, match="student has T = 9, 8, 7 on the ranks of group"):
            rk.attention_kl_value_and_grad(x, x, x, x, x[..., 0], segment_ids=segment_ids, group=dist.group.WORLD)


def test_shards_of_unequal_length_are_refused(tmp_path: Path) -> None:
    spawn(3, unequal_lengths, tmp_path)
