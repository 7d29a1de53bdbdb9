"""The part of tools/benchmark_kernels.py that runs over several processes: the relation of one sharded sequence.

    deepspeed --num_gpus 4 tools/benchmark_kernels.py --lengths 65536,131072      (or torchrun --nproc-per-node 4)

For each length: the whole on one GPU (the others wait), then on all P ranks in mode `sequence` (shards of all heads,
`relation_kl(..., group=...)`; `at once`: `relation_kl_value_and_grad`, as the trainer calls it; by memory that all
GPUs reach, or, with RELATION_KL_PEER_MEMORY=0 or where there is none, by messages) and in mode `heads` (whole sequences
of heads / P). `heads+exchange` has the all-to-all of student, teacher and gradient too, which a caller
pays whose tensors are sharded along the sequence; the trainer's are not: Ulysses has exchanged them for attention. A
sample is the slowest rank's, all started together, modes in turns; medians are shown. With --head-groups the modes
`sequence` come a second time for each number of groups of heads.

efficiency: time on one GPU / (P x time on P). sent: MiB that the busiest rank sends in a forward and backward, or puts
into other ranks' memory and copies from there.
transfers: the same exchanges with nothing computed between them, in ms; computation: the same visits with nothing
exchanged. hidden: the part of the transfers that the computation covers. host ahead: ms where the GPU begins 0.15 s
after the host, and so waits for it less, or not at all. peak MiB: as in the table for one process, of the worst rank,
with the memory that other ranks reach and that of graphs, which stay.
"""

from __future__ import annotations

import csv
import importlib.util
import os
import sys
import time
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import relation_kl as rk
import torch
import torch.distributed as dist
from relation_kl import chunk_plan, exchanges, functional, peer_memory, peer_parallel, torch_visit
from relation_kl.peer_frame import Frame
from relation_kl.peer_memory import Lane
from torch import Tensor

COLUMNS = (
    *("mode", "ranks", "batch", "heads", "seq_len", "head_dim", "dtype", "median_ms", "p10_ms", "p90_ms", "samples"),
    *(
        "efficiency",
        "sent_mib",
        "transfers_ms",
        "computation_ms",
        "hidden",
        "host_ahead_ms",
        "peak_mib",
        "gpu",
        "driver",
        "torch",
        "triton",
        "commit",
    ),
)
LAYOUT = "{:>7} {:>4} {:26} {:>5} {:>26} {:>10} {:>9} {:>12} {:>14} {:>7} {:>13} {:>9}"
TITLES = ("tokens", "dim", "mode", "ranks", "forward+backward ms", "efficiency", "sent MiB", "transfers ms")
TITLES += ("computation ms", "hidden", "host ahead ms", "peak MiB")
Pool = dict[Any, deque[Tensor]]  # tensors by shape and type
Timed = tuple[Callable[[], AbstractContextManager[None]], Callable[[], None]]  # a call, and within what it is made
GATE_LENGTH, GATE_HEADS = 300, 4  # of a shard


def main(options: Namespace, conditions: Callable[[], dict[str, Any]]) -> int:
    """Runs on every rank; rank 0 prints.

    Args:
        options: of benchmark_kernels.
        conditions: gives GPU, driver, versions and commit.
    """
    on_gpu = options.device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        options.device = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group("nccl" if on_gpu else "gloo")
    nccl = {"backend": "nccl", "pg_options": rk.nccl_options(dist.get_world_size())} if on_gpu else {}
    group = dist.new_group(**nccl)
    try:
        return _run(options, conditions, group)
    finally:
        dist.destroy_process_group()


def _run(options: Namespace, conditions: Callable[[], dict[str, Any]], group: Any) -> int:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[options.dtype]
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if not options.skip_gate:
        wrong = torch.tensor([_gate(options, dtype, dim) for dim in options.head_dims], device=options.device).any()
        dist.all_reduce(wrong := wrong.int())
        if wrong:
            print("the gate failed: nothing was timed", file=sys.stderr)
            return 1
    facts = conditions() if rank == 0 else {}
    path: Path | None = options.csv if rank == 0 else None
    if rank == 0:
        print("{gpu}, driver {driver}, torch {torch}, triton {triton}, commit {commit}".format(**facts))
        print(
            f"{ranks} ranks, {options.dtype}, batch {options.batch}, {options.heads} heads, backend {options.backend}"
        )
        print(f"\n{LAYOUT.format(*TITLES)}", flush=True)
    with open(path or os.devnull, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for head_dim in options.head_dims:
            for seq_len in options.lengths:
                shape = {"batch": options.batch, "heads": options.heads, "seq_len": seq_len, "head_dim": head_dim}
                for row in _measure(options, dtype, seq_len, head_dim, group):
                    if rank == 0:
                        writer.writerow({**shape, "dtype": options.dtype, **row, **facts})
                        file.flush()
                        print(_line(seq_len, head_dim, row), flush=True)
    return 0


def _measure(options: Namespace, dtype: torch.dtype, seq_len: int, head_dim: int, group: Any) -> list[dict[str, Any]]:
    """Values for COLUMNS, a row a mode; the same on every rank."""
    ranks = dist.get_world_size()
    modes = ["one", "sequence", "sequence at once"]
    modes += ["heads", "heads+exchange"] if options.heads % ranks == 0 else []
    cases = {mode: _case(mode, options, dtype, seq_len, head_dim, group) for mode in modes}
    for groups in options.head_groups:
        for mode in ("sequence", "sequence at once"):
            call, returned = cases[mode]
            cases[f"{mode}, {groups} groups"] = _in_groups(call, groups), returned
    timed: dict[str, Timed] = {mode: (nullcontext, call) for mode, (call, _) in cases.items()}
    random: Pool = {}
    for mode, (call, _) in cases.items():
        if mode.startswith("sequence"):
            timed[f"{mode}: transfers"] = (_transfers_only, call)
            timed[f"{mode}: computation"] = (partial(_computation_only, random), call)
            if options.device.type == "cuda":
                timed[f"{mode}: host ahead"] = (_host_ahead, call)
    times = _times(timed, options)
    found, single = [], float(np.median(times["one"]))
    for mode, (call, returned) in cases.items():
        with _counting() as sent:
            call()
        peak = _peak(call, returned, group, options.device)
        most = torch.tensor([peak, sent[0]], dtype=torch.float64, device=options.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        peak_mib, sent_mib = (most / 2**20).tolist()
        p10, median, p90 = np.percentile(times[mode], (10, 50, 90)).tolist()
        used = 1 if mode == "one" else ranks
        row: dict[str, Any] = {"mode": mode, "ranks": used, "median_ms": median, "p10_ms": p10, "p90_ms": p90}
        row |= {"samples": len(times[mode]), "efficiency": single / (used * median), "peak_mib": peak_mib}
        if mode.startswith("sequence"):
            transfers, computation = (float(np.median(times[f"{mode}: {x}"])) for x in ("transfers", "computation"))
            row |= {"sent_mib": sent_mib, "transfers_ms": transfers, "computation_ms": computation}
            row["hidden"] = 1 - (median - computation) / transfers
            if f"{mode}: host ahead" in times:
                row["host_ahead_ms"] = float(np.median(times[f"{mode}: host ahead"]))
        found.append(row)
    return found


def _case(
    mode: str, options: Namespace, dtype: torch.dtype, seq_len: int, head_dim: int, group: Any
) -> tuple[Callable[[], None], int]:
    """A forward and backward of this rank in a mode, and the bytes of the gradient that it returns."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if mode == "one" and rank != 0:
        return (lambda: None), 0
    tokens = seq_len if mode in ("one", "heads") else seq_len // ranks
    heads = options.heads // ranks if mode == "heads" else options.heads
    torch.manual_seed(rank)
    student = torch.randn(options.batch, heads, tokens, head_dim, dtype=dtype, device=options.device).requires_grad_()
    teacher = (student + 0.3 * torch.randn_like(student)).detach()
    rows = (options.heads // ranks, seq_len) if mode == "heads+exchange" else (heads, tokens)
    upstream = torch.randn(options.batch, *rows, device=options.device)

    def forward_backward() -> None:
        over = group if mode == "sequence" else None
        rk.relation_kl(student, teacher, group=over, backend=options.backend).backward(upstream)
        student.grad = None

    def at_once() -> None:
        rk.relation_kl_value_and_grad(student, teacher, upstream, group=group, backend=options.backend)

    def exchanged() -> None:
        whole = [_exchange(x.detach(), 1, 2) for x in (student, teacher)]
        _, grad = rk.relation_kl_value_and_grad(whole[0], whole[1], upstream, backend=options.backend)
        _exchange(grad, 2, 1)

    calls = {"heads+exchange": exchanged, "sequence at once": at_once}
    return calls.get(mode, forward_backward), student.nbytes


def _in_groups(call: Callable[[], None], groups: int) -> Callable[[], None]:
    """The call with so many groups of heads, half as many in a forward pass alone."""

    def called() -> None:
        with patch.object(chunk_plan, "count_groups", lambda *shape: groups):
            call()

    return called


def _times(calls: dict[str, Timed], options: Namespace) -> dict[str, list[float]]:
    """Milliseconds of the slowest rank, all started together, once warm; the calls in turns, each time in another
    order, for after a call that lets a GPU rest the next one is faster."""
    on_gpu = options.device.type == "cuda"
    samples = options.repeats or (8 if on_gpu else 2)
    times = torch.zeros(samples + 1, len(calls), device=options.device)
    for i in range(samples + 1):
        for j in np.random.default_rng(i).permutation(len(calls)):
            within, call = list(calls.values())[j]
            dist.all_reduce(torch.zeros(1, device=options.device))
            if on_gpu:
                torch.cuda.synchronize()
            dist.barrier()
            with within():
                times[i, j] = _milliseconds(call, on_gpu)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return dict(zip(calls, times[1:].T.tolist(), strict=True))


def _milliseconds(call: Callable[[], None], on_gpu: bool) -> float:
    if not on_gpu:
        begin = time.perf_counter()
        call()
        return (time.perf_counter() - begin) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _peak(call: Callable[[], None], returned: int, group: Any, device: torch.device) -> float:
    """CUDA bytes of a call beyond its inputs and the returned gradient, with those that stay; 0 on a CPU."""
    if not torch.cuda.is_available():
        call()
        return 0.0
    peer_memory._REACH.pop(group, None)  # what was there is as large as the largest call
    call()  # and its graphs are captured
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    reach = peer_memory._REACH.get(group)
    pools = set() if reach is None else {lane.pool for lane in reach.lanes}
    of_graphs = (x["total_size"] for x in torch.cuda.memory_snapshot() if tuple(x["segment_pool_id"]) in pools)
    stays = 0 if reach is None else reach.nbytes + sum(of_graphs)
    return torch.cuda.max_memory_allocated() - before - returned + stays


def _exchange(x: Tensor, split: int, join: int) -> Tensor:
    """All-to-all of [B, H, T, D]: parts along one dimension go to the ranks, what comes in is joined along another."""
    outgoing = torch.stack([part.contiguous() for part in x.chunk(dist.get_world_size(), split)])
    incoming = torch.empty_like(outgoing)
    dist.all_to_all_single(incoming, outgoing)
    return torch.cat(incoming.unbind(), join)


@contextmanager
def _counting() -> Iterator[list[int]]:
    """Within: the bytes that this process sends, or puts and copies, in the one number of the list."""
    total, send, copy, put = [0], exchanges.Exchanges.send, Lane.copy, Lane.put

    def counted(every: Any, x: Tensor, peer: int) -> Any:
        total[0] += x.nbytes
        return send(every, x, peer)

    def copied(lane: Lane, into: Tensor, there: Tensor) -> None:
        total[0] += there.nbytes
        copy(lane, into, there)

    def given(lane: Lane, rank: int, there: Tensor, *parts: Tensor) -> None:
        total[0] += there.nbytes if rank != lane.reach.rank else 0
        put(lane, rank, there, *parts)

    with ExitStack() as stack:
        stack.enter_context(patch.object(exchanges.Exchanges, "send", counted))
        stack.enter_context(patch.multiple(Lane, copy=copied, put=given))
        stack.enter_context(patch.object(peer_parallel, "_CAPTURED", sys.maxsize))
        stack.enter_context(_captured_apart("counting"))
        yield total


@contextmanager
def _captured_apart(name: str, **changed: Any) -> Iterator[None]:
    """Within: no graphs that were captured elsewhere, and these functions in the place of those of visits."""

    def parallel(reach: Any, local: ModuleType, visits: ModuleType) -> Any:
        if (name, visits) not in _VISITS:
            _VISITS[name, visits] = ModuleType(name)
            vars(_VISITS[name, visits]).update(vars(visits) | changed)
        return peer_parallel.PeerParallel(reach, local, _VISITS[name, visits])

    with patch.object(functional, "PeerParallel", parallel):
        yield


_VISITS: dict[tuple[str, ModuleType], ModuleType] = {}


def _nothing(*arguments: Any) -> None:
    pass


@contextmanager
def _transfers_only() -> Iterator[None]:
    """Within: exchanges without computation."""
    modules: list[Any] = [torch_visit]
    if importlib.util.find_spec("triton") is not None:
        modules.append(importlib.import_module("relation_kl.triton_visit"))
    with ExitStack() as stack:
        stack.enter_context(_captured_apart("transfers", forward=_nothing, backward=_nothing))
        for module in modules:
            stack.enter_context(patch.multiple(module, forward=_nothing, backward=_nothing))
        yield


@contextmanager
def _computation_only(made: Pool) -> Iterator[None]:
    """Within: nothing is exchanged; what would come from other ranks is random, one of four tensors, in turn, or, where
    all reach one another's memory, of this rank's own two chunks."""
    at = Frame.at

    def random(x: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        shape = tuple(x.shape if shape is None else shape)
        found = made.setdefault((shape, x.dtype), deque())
        while len(found) < 4:  # at once, in the call that warms up
            like = torch.randn if x.is_floating_point() else torch.zeros
            found.append(like(shape, dtype=x.dtype, device=x.device))
        found.rotate()
        return found[0]

    def here(frame: Frame, name: str, chunk: int, rank: int | None = None, place: int | None = None) -> Tensor:
        return at(frame, name, chunk, frame.rank, chunk % 2 if place is None else place)

    def copied(lane: Lane, rank: int, into: Tensor, there: Tensor) -> None:
        lane.copy(into, there)

    names = ("offer", "until_taken", "barrier")
    with ExitStack() as stack:
        stack.enter_context(_captured_apart("computation"))
        stack.enter_context(patch.object(Frame, "at", here))
        stack.enter_context(patch.multiple(Lane, take=copied, **dict.fromkeys(names, _nothing)))
        stack.enter_context(patch.object(exchanges, "start", lambda operations: []))
        stack.enter_context(patch.object(exchanges, "room", random))
        yield


@contextmanager
def _host_ahead() -> Iterator[None]:
    """Within: the GPU begins when the host has issued much or all of a call: what it takes is not the host's time."""
    torch.cuda._sleep(300_000_000)  # clocks: 0.15 s
    yield


def _gate(options: Namespace, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the sharded relation errs more than twice as much as the dense version in the same precision."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(head_dim)
    size = (6 * head_dim**-0.5) ** 0.5
    length = ranks * GATE_LENGTH
    x = (torch.randn(1, GATE_HEADS, length, head_dim) * size).to(options.device, dtype)
    y = x + (0.3 * size * torch.randn(1, GATE_HEADS, length, head_dim)).to(x)
    g = torch.randn(1, GATE_HEADS, length).to(options.device)
    mine = slice(rank * GATE_LENGTH, (rank + 1) * GATE_LENGTH)
    wrong = False
    for ids in (None, (torch.arange(length, device=options.device)[None] + 50) // (GATE_LENGTH + 70)):
        dense = []
        for kind in (dtype, torch.float64):
            leaf = x.to(kind).detach().requires_grad_()
            rows = rk.reference.relation_kl(leaf, y.to(kind), segment_ids=ids)
            dense.append([rows.detach(), *torch.autograd.grad(rows, [leaf], g.to(rows.dtype))])
        # All heads at once, as such a length has them, and each by itself, as long ones have a few.
        for heads, each in (("all heads", GATE_HEADS), ("each head", 1)):
            got: list[Any] = []

            def run(got: list[Any] = got, ids: Tensor | None = ids) -> None:
                got += rk.relation_kl_value_and_grad(
                    x[:, :, mine], y[:, :, mine], g[:, :, mine], segment_ids=None if ids is None else ids[:, mine],
                    group=dist.group.WORLD, backend=options.backend,
                )  # fmt: skip

            _in_groups(run, each)()
            for what, a, b, c in zip(("rows", "grad"), got, *dense, strict=True):
                b, c = b[:, :, mine].double(), c[:, :, mine]
                error, budget = (float((z.double() - c).norm() / c.norm()) for z in (a, b))
                if rank == 0:
                    kind = f"{'one' if ids is None else 'documents across shards'}, {heads}, head_dim {head_dim}"
                    print(f"gate: {kind}: {what} {error:.1e} (plain {budget:.1e})", file=sys.stderr)
                wrong |= not error <= 2 * budget + 1e-6
    return wrong


def _line(seq_len: int, head_dim: int, row: dict[str, Any]) -> str:
    def number(name: str, digits: str) -> str:
        return format(row[name], digits) if name in row else ""

    times = f"{row['median_ms']:.2f} ({row['p10_ms']:.2f}..{row['p90_ms']:.2f})"
    cells = [seq_len, head_dim, row["mode"], row["ranks"], times, f"{row['efficiency']:.3f}"]
    cells += [
        number("sent_mib", ".0f"),
        number("transfers_ms", ".2f"),
        number("computation_ms", ".2f"),
        number("hidden", ".0%"),
        number("host_ahead_ms", ".2f"),
    ]
    return LAYOUT.format(*cells, f"{row['peak_mib']:.0f}")
