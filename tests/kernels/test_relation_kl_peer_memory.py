"""Ranks that reach one another's memory: the same results as by messages, bounded memory, and when they do."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import relation_kl as rk
import torch
import torch.distributed as dist
from other_order import gradients_in_another_order
from relation_kl import chunk_plan, peer_memory, peer_parallel, torch_backend, torch_visit
from relation_kl.peer_memory import Lane
from relation_kl.torch_backend import Operands
from relation_kl_checks import LAYOUTS, Alive
from shared_memory import shared_memory
from test_relation_kl_group import check, check_all, check_in_triton, on_gpus, spawn
from test_relation_kl_head_groups import many_groups
from torch import Tensor


def all_cases(folder: Path) -> None:
    with shared_memory(folder):
        check_all([torch.float32, torch.bfloat16] if dist.get_world_size() == 2 else [torch.float32])


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_sharded_is_whole(ranks: int, tmp_path: Path) -> None:
    spawn(ranks, all_cases, tmp_path, tmp_path)


def heads_and_layouts(folder: Path) -> None:
    rank, ranks, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    with shared_memory(folder):
        for layout in LAYOUTS:
            check(rank, ranks, group, torch.float32, 2, 9, "crossing", "torch", layout=layout)
        many_groups()
    with shared_memory(folder), gradients_in_another_order():
        for dtype in (torch.float32, torch.float16):
            for kind in ("one", "crossing", "right"):
                check(rank, ranks, group, dtype, None, 9, kind, "torch")


@pytest.mark.parametrize("ranks", [2, 3])
def test_groups_of_heads_and_layouts(ranks: int, tmp_path: Path) -> None:
    spawn(ranks, heads_and_layouts, tmp_path, tmp_path)


def few_frames(folder: Path) -> None:
    """More kinds of segments in turn than frames are kept for."""
    rank, ranks, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    with shared_memory(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(peer_parallel, "_MOST_FRAMES", 2)
        reach = peer_memory.of_group(group, torch.device("cpu"))
        assert reach is not None
        forgotten, forget = list[int](), Lane.forget
        patch.setattr(Lane, "forget", lambda lane: (forgotten.append(len(lane.kept)), forget(lane)))
        for shard in (9, 1, 9):
            for kind in ("one", "crossing", "windows", "right", "documents"):
                check(rank, ranks, group, torch.float32, None, shard, kind, "torch")
                assert all(len(lane.kept) <= 2 for lane in reach.lanes)
        assert forgotten.count(2) >= 4


def test_no_more_frames_are_kept_than_are_to_be(tmp_path: Path) -> None:
    spawn(3, few_frames, tmp_path, tmp_path)


def in_triton(folder: Path) -> None:
    with shared_memory(folder):
        check_in_triton()


@pytest.mark.skipif(torch.cuda.is_available(), reason="in Triton's interpreter only: the ranks have no GPU each")
def test_sharded_is_whole_in_triton(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="needs triton, which is not installed")
    spawn(2, in_triton, tmp_path, tmp_path)


def count_bytes(folder: Path) -> None:
    """What a rank has for all calls, and what is made in one, in chunks of student and teacher or of a gradient."""
    ranks, shard = dist.get_world_size(), 2**15
    x = torch.randn(1, 2, shard, 64, dtype=torch.bfloat16)
    y, g, chunk = x.flip(2), torch.ones(1, 2, shard), x.nbytes
    operands = Operands(x, x, y, y, True)
    with shared_memory(folder) as handles, pytest.MonkeyPatch.context() as patch:
        for name in ("forward", "backward"):
            patch.setattr(torch_visit, name, lambda *arguments: None)
        reach = peer_memory.of_group(dist.group.WORLD, x.device)
        assert reach is not None
        parallel = peer_parallel.PeerParallel(reach, torch_backend, torch_visit)
        patch.setattr(chunk_plan, "count_groups", lambda *shape: 1)
        parallel.value_and_grad(operands, 1.0, None, g)
        # Of a lane, for both heads go together: two chunks of keys, and gradients of them, gradients of others' keys in
        # two places; keys of two chunks that were fetched, and a gradient that comes in. Numbers of rows are few.
        most = 1.1 * (2 + 2 + 2 + 2 + 1) * chunk + 2 * peer_memory._GRANULE
        assert reach.nbytes <= most, (reach.nbytes / chunk, ranks)
        memory = [x for handle in handles for x in handle.memory]
        with Alive(chunk // 2, x, y, reach._scratch, *memory) as alive, alive.but_in(torch_visit, "own_logits"):
            parallel.value_and_grad(operands, 1.0, None, g)
        assert alive.most == x.nbytes  # the returned gradient


@pytest.mark.parametrize("ranks", [2, 6])
def test_memory_is_that_of_a_shard(ranks: int, tmp_path: Path) -> None:
    spawn(ranks, count_bytes, tmp_path, tmp_path)


@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 8])
def test_ranks_count_alike_what_one_fetches(ranks: int) -> None:
    """In whose turn a gradient is to be found is worked out by who made it and by who takes it."""
    plan = chunk_plan._one_segment(0, ranks, (4, 4))
    assert plan is not None
    for worker in range(ranks):
        made = 0
        for step in plan.steps[::-1]:
            assert plan.fetched_before(worker, step) == made
            made += len(plan.fetched(worker, (worker - step) % ranks))


@pytest.mark.parametrize(
    "others, setting, forbidden, reached",
    [
        ([("here", 0), ("here", 1)], None, False, True),
        ([("here", 0), ("there", 1)], None, False, False),
        ([("here", 0), ("here", 0)], None, False, False),  # each sees a GPU of its own only
        ([("here", 0), ("here", 2)], None, False, False),  # which this rank cannot reach
        ([("here", 0), ("here", 1)], "0", False, False),
        ([("here", 0), ("here", 1)], None, True, False),
    ],
)
def test_who_reaches_whom(
    others: list[tuple[str, int]],
    setting: str | None,
    forbidden: bool,
    reached: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RELATION_KL_PEER_MEMORY", raising=False)
    if setting is not None:
        monkeypatch.setenv("RELATION_KL_PEER_MEMORY", setting)
    wanted = setting is None
    said: list[Any] = []

    def gather(every: list[Any], mine: Any, group: Any = None) -> None:
        said.append(mine)
        every[:] = [(wanted, *other) for other in others] if isinstance(mine, tuple) else [mine, True]

    monkeypatch.setattr(socket, "gethostname", lambda: "here")
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: {a, b} == {0, 1})

    def rendezvous(size: int, group: Any, device: torch.device) -> None:
        if forbidden:
            raise RuntimeError("Operation not permitted")

    monkeypatch.setattr(peer_memory, "_rendezvous", rendezvous)
    with pytest.warns(UserWarning, match="Operation not permitted") if forbidden else contextlib.nullcontext():
        assert peer_memory._reached(None, torch.device("cuda", 0)) == reached
    assert said == [(wanted, "here", 0), *([True, reached] if reached or forbidden else [False])]


def by_messages_on_gpus(dtype: torch.dtype, key_heads: int | None) -> None:
    """As `check_on_gpus`, which goes without messages on one host."""
    os.environ["RELATION_KL_PEER_MEMORY"] = "0"
    rank, ranks, device = dist.get_rank(), dist.get_world_size(), torch.device("cuda", dist.get_rank())
    for least in (True, False):
        chunk_plan.count_groups = lambda *shape, least=least: 1 if least else shape[1]
        for shard, dim in ((9, 64), (300, 128)):
            for kind in ("one", "crossing", "documents"):
                check(rank, ranks, dist.group.WORLD, dtype, key_heads, shard, kind, "triton", dim, device)
    assert peer_memory.of_group(dist.group.WORLD, device) is None


@on_gpus
def test_messages_on_gpus(dtype: torch.dtype, key_heads: int | None, tmp_path: Path) -> None:
    spawn(torch.cuda.device_count(), by_messages_on_gpus, tmp_path, dtype, key_heads)


def many_calls_on_gpus() -> None:
    """One after the other without waiting, on several streams, by graphs from the second on, of several lengths and
    kinds: no call reads what another one has left, or what is yet to come."""
    rank, ranks, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    device = torch.device("cuda", rank)
    reach = peer_memory.of_group(group, device)
    assert reach is not None
    chunk_plan.count_groups = lambda *shape: -(-2 * shape[1] // 3)  # 6 of 8 heads, of one and of two
    torch.manual_seed(rank)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, 128, dtype=torch.bfloat16, device=device)

    def apart(x: Tensor, y: Tensor, g: Tensor, ids: Tensor | None = None) -> list[Tensor]:
        rows = rk.relation_kl(x, y, segment_ids=ids, group=group)
        return [rows.detach(), *torch.autograd.grad(rows, [x], g)]

    calls: list[Any] = []
    for shard in (512, 256, 1024):
        x, y, g = numbers(1, 8, shard).requires_grad_(), numbers(1, 8, shard), torch.randn(1, 8, shard, device=device)
        k, k_t = numbers(1, 2, shard), numbers(1, 2, shard)
        ids = (torch.arange(shard, device=device)[None] + rank * shard) // (shard + 100)
        # One document is on two ranks: rank 1 takes no keys of others, and further ones nothing at all.
        token = torch.arange(shard, device=device)[None]
        few = torch.where((token < 20) & (rank == 1), (shard - 1) // 50, token // 50 + 1000 * rank)
        calls += [
            lambda x=x, y=y, g=g: rk.relation_kl_value_and_grad(x, y, g, group=group),
            lambda x=x, y=y, g=g: apart(x, y, g),
            lambda x=x, y=y, k=k, k_t=k_t, g=g: rk.attention_kl_value_and_grad(x, k, y, k_t, g, group=group),
            lambda x=x, y=y, g=g, ids=ids: rk.relation_kl_value_and_grad(x, y, g, segment_ids=ids, group=group),
            lambda x=x, y=y, g=g, few=few: apart(x, y, g, few),
        ]
    streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    found = []
    for i in range(12 * len(calls)):
        with torch.cuda.stream(streams[i % 7 % 3]):
            found.append([x.detach() for x in calls[i % len(calls)]()])
    torch.cuda.synchronize()
    graphs = [x for lane in reach.lanes for frame in lane.kept.values() for x in frame.graphs.values()]
    assert len(graphs) >= 12 and all(isinstance(x, torch.cuda.CUDAGraph) for x in graphs)
    os.environ["RELATION_KL_PEER_MEMORY"] = "0"
    peer_memory._REACH.clear()
    expected = [[x.detach() for x in call()] for call in calls]
    for i, tensors in enumerate(found):
        (values, *grads), (rows, *gradients) = tensors, expected[i % len(calls)]
        torch.testing.assert_close(values, rows, rtol=1e-4, atol=1e-5)
        for a, b in zip(grads, gradients, strict=True):
            assert float((a - b).norm() / b.norm()) < 3e-3, (i, ranks)


class Graph:
    """Stands for a CUDA graph, which ends the process where memory that others reach is given back in its capture."""

    capturing = False

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        self.capturing = True

    def capture_end(self) -> None:
        self.capturing = False


@pytest.mark.parametrize("enabled", [True, False])
def test_no_garbage_is_collected_in_a_capture(enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, given_back = Graph(), list[bool]()
    for name, fake in (("CUDAGraph", lambda: graph), ("Stream", lambda device: None), ("graph_pool_handle", lambda: 1)):
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())

    class Memory:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            given_back.append(graph.capturing)

    def function(fails: bool) -> None:
        Memory()
        _ = [[] for _ in range(2000)]  # enough for Python to collect
        if fails:
            raise ValueError("a visit that fails")

    reach: Any = SimpleNamespace(device=torch.device("cpu"))
    lane, was, thresholds = Lane(reach, 0), gc.isenabled(), gc.get_threshold()
    gc.set_threshold(100)
    (gc.enable if enabled else gc.disable)()
    try:
        assert lane.capture(lambda: function(False)) is graph
        assert gc.isenabled() == enabled
        with pytest.raises(ValueError):
            lane.capture(lambda: function(True))
        assert gc.isenabled() == enabled
        gc.collect()
    finally:
        gc.set_threshold(*thresholds)
        (gc.enable if was else gc.disable)()
    assert given_back == [False, False]


needs_two = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason=f"needs two GPUs; this machine has {torch.cuda.device_count()}"
)


@pytest.mark.gpu
@needs_two
def test_many_calls_on_gpus(tmp_path: Path) -> None:
    spawn(torch.cuda.device_count(), many_calls_on_gpus, tmp_path)


def a_hung_rank_on_gpus(folder: Path) -> None:
    """The last rank lives, but does not come to the second call; on the others it is an error in time."""
    rank, wait, over = dist.get_rank(), 5.0, folder / "over"
    group = dist.new_group(backend="nccl", timeout=timedelta(seconds=wait))
    x = torch.randn(1, 2, 512, 128, dtype=torch.bfloat16, device=torch.device("cuda", rank))
    rk.relation_kl(x, x, group=group).sum().item()
    if rank == dist.get_world_size() - 1:
        while not over.exists():
            time.sleep(0.05)
        os._exit(0)
    began = time.monotonic()
    with pytest.raises(RuntimeError):
        rk.relation_kl(x, x, group=group).sum().item()
    took = time.monotonic() - began
    assert wait - 1 < took < wait + 10, took
    time.sleep(1)  # for the other ranks to have theirs
    over.touch()
    os._exit(0)  # a GPU's error is for good


@pytest.mark.gpu
@needs_two
def test_a_hung_rank_is_an_error_on_gpus(tmp_path: Path) -> None:
    spawn(torch.cuda.device_count(), a_hung_rank_on_gpus, tmp_path, tmp_path)
