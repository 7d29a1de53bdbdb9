"""Memory of each GPU of a host that all of a group's ranks read and write (over NVLink, or PCIe), and their signals.

It rests on torch's symmetric memory. Copies from another rank's memory are made by the GPUs' copy engines, and signals
are kernels of one block: the multiprocessors are left to the computation, and the host starts a copy as fast as a
kernel, where a send and a receive by NCCL take it ten times as long, and blocks of the GPU. What is done so can be
captured in a CUDA graph.
"""

from __future__ import annotations

import gc
import math
import os
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor

LANES = 2  # what is worked on at a time, each on a stream and in a part of the memory of its own
_ALIGNMENT, _GRANULE = 256, 2**21  # bytes; GPUs give out memory in granules
_BARRIER, _READY, _TAKEN, _CHANNELS = 0, 1, 2, 3  # of a lane

Like = tuple[Sequence[int], torch.dtype]  # a tensor's shape and type


class Reach:
    """A piece of memory of each rank of a group, laid out alike on all of them, which all of them reach.

    Args:
        group: torch process group.
        device: this rank's.

    Attributes:
        rank: this one's, in the group.
        lanes: its parts.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        self._group, self.device = ref(group), device  # it is the group that keeps this
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.lanes = [Lane(self, number) for number in range(LANES)]
        self._handle: Any = None
        self._memory: Any = None
        self._scratch: Any = None
        self._sizes = [(0, 0)] * LANES  # of each lane: what others reach, and scratch
        self._timeout_ms = int(_timeout(group, device) * 1e3)

    @property
    def group(self) -> Any:
        return self._group()

    @property
    def nbytes(self) -> int:
        """What it takes of this rank's memory, until the group is taken down; kernels' small buffers come to it."""
        return sum(map(sum, self._sizes))

    def reserve(self, lane: int, shared: int, scratch: int) -> None:
        """At least so many bytes of a lane, and of its scratch; to be called on all ranks alike.

        Where there were fewer, all is new, once what was begun is done, and what lanes have kept of the old is gone.
        """
        wanted = tuple(-(-size // _GRANULE) * _GRANULE for size in (shared, scratch))
        there = self._sizes[lane]
        if wanted[0] <= there[0] and wanted[1] <= there[1]:
            return
        for each in self.lanes:
            each.forget()
        self._sizes[lane] = max(wanted[0], there[0]), max(wanted[1], there[1])
        shared, scratch = map(sum, zip(*self._sizes, strict=True))
        self._handle = self._memory = self._scratch = None
        self._scratch = torch.empty(scratch, dtype=torch.uint8, device=self.device)
        self._handle, self._memory = _rendezvous(shared, self.group, self.device)

    def at(self, rank: int | None, lane: int, offset: int, like: Like) -> Tensor:
        """What lies there in a rank's memory, or, for None, in this one's scratch."""
        shape, dtype = like
        before = self._sizes[:lane]
        if rank is not None:
            begin = sum(shared for shared, _ in before) + offset
            return self._handle.get_buffer(rank, tuple(shape), dtype, begin // dtype.itemsize)
        begin = sum(scratch for _, scratch in before) + offset
        return self._scratch[begin : begin + math.prod(shape) * dtype.itemsize].view(dtype).view(*shape)

    def barrier(self, channel: int) -> None:
        self._handle.barrier(channel, self._timeout_ms)

    def signal(self, rank: int, channel: int) -> None:
        self._handle.put_signal(rank, channel, self._timeout_ms)

    def wait_for(self, rank: int, channel: int) -> None:
        self._handle.wait_signal(rank, channel, self._timeout_ms)


class Lane:
    """A part of the memory, with signals of its own, and a stream beside the one on which its work is done.

    Attributes:
        number: among the lanes.
        kept: what is to be used again, and rests on where the memory lies.
        pool: of memory of the graphs that were captured; they do not run at the same time.
    """

    def __init__(self, reach: Reach, number: int) -> None:
        self.reach, self.number = reach, number
        self.kept: dict[Any, Any] = {}
        self.pool: Any = None
        self._last: Any = None
        on_gpu = reach.device.type == "cuda"
        self._beside = torch.cuda.Stream(reach.device, priority=-1) if on_gpu else None

    def forget(self) -> None:
        """What was kept, once it is not used any longer."""
        if self.reach.device.type == "cuda":
            torch.cuda.synchronize(self.reach.device)
        self.kept.clear()
        self.pool = None  # with its last graph a pool is gone

    def at(self, rank: int | None, offset: int, like: Like) -> Tensor:
        """As `Reach.at`."""
        return self.reach.at(rank, self.number, offset, like)

    def begin(self) -> None:
        """The current stream waits until what was done here before, on whichever stream, has ended."""
        self.wait(self._last)

    def end(self) -> None:
        """What is done here ends with what was given to the current stream until now."""
        if self._beside is not None:
            self._last = torch.cuda.current_stream(self.reach.device).record_event()

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Within: on the stream beside the current one, when that is as far as now."""
        if self._beside is None:
            yield
            return
        self._beside.wait_stream(torch.cuda.current_stream(self.reach.device))
        with torch.cuda.stream(self._beside):
            yield

    def mark(self) -> Any:
        """The end, for now, of what was given to the stream beside; for `wait`."""
        return None if self._beside is None else self._beside.record_event()

    def wait(self, mark: Any) -> None:
        """The current stream waits until that was done."""
        if mark is not None:
            torch.cuda.current_stream(self.reach.device).wait_event(mark)

    def barrier(self) -> None:
        """Until all ranks are here."""
        self.reach.barrier(_CHANNELS * self.number + _BARRIER)

    def offer(self, rank: int) -> None:
        """Say to a rank that what it waits for is there."""
        self.reach.signal(rank, _CHANNELS * self.number + _READY)

    def take(self, rank: int, into: Tensor, there: Tensor) -> None:
        """Wait for a rank's offer, copy it, and say so."""
        self.reach.wait_for(rank, _CHANNELS * self.number + _READY)
        self.copy(into, there)
        self.reach.signal(rank, _CHANNELS * self.number + _TAKEN)

    def until_taken(self, rank: int) -> None:
        """Wait until a rank has taken what was offered."""
        self.reach.wait_for(rank, _CHANNELS * self.number + _TAKEN)

    def copy(self, into: Tensor, there: Tensor) -> None:
        """From another rank's memory."""
        into.copy_(there)

    def put(self, rank: int, there: Tensor, *parts: Tensor) -> None:
        """Into a rank's memory: one tensor, or several as one."""
        if len(parts) == 1:
            there.copy_(parts[0])
        else:
            torch.stack(parts, out=there)

    def capture(self, function: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """A graph of what it gives to the current stream and the one beside, which has no work left in the end."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self.reach.device)
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        with torch.cuda.stream(stream), _nothing_collected():
            # Of this thread: others, NCCL's among them, may ask the GPU what they like.
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                function()
            finally:
                graph.capture_end()
        return graph


def of_group(group: Any, device: torch.device) -> Reach | None:
    """The memory of a group, None where its ranks do not reach one another's.

    It is there once, for as long as the group, and as large as the largest call needed it. RELATION_KL_PEER_MEMORY=0 in
    the environment, on any rank, is for doing without.
    """
    if device.type != "cuda" or dist.get_backend(group) != "nccl":
        return None
    if group not in _REACH:
        _REACH[group] = Reach(group, device) if _reached(group, device) else None
    return _REACH[group]


_REACH: WeakKeyDictionary[Any, Reach | None] = WeakKeyDictionary()


def _reached(group: Any, device: torch.device) -> bool:
    """Whether all ranks are on one host, each with a GPU of its own that it sees all others' of; the same on all."""
    index = torch.cuda.current_device() if device.index is None else device.index
    mine = os.environ.get("RELATION_KL_PEER_MEMORY") != "0", socket.gethostname(), index
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, mine, group=group)
    wanted, hosts, indices = zip(*every, strict=True)
    others = set(indices) - {index}
    reached = all(wanted) and len(set(hosts)) == 1 and len(others) == len(every) - 1
    reached = reached and all(
        i < torch.cuda.device_count() and torch.cuda.can_device_access_peer(index, i) for i in others
    )
    dist.all_gather_object(every, reached, group=group)
    if not all(every):
        return False
    try:  # a container may forbid it
        _rendezvous(_GRANULE, group, device)
    except RuntimeError as error:
        warnings.warn(f"ranks send messages, for their GPUs cannot share memory: {error}", stacklevel=2)
        reached = False
    dist.all_gather_object(every, reached, group=group)
    return all(every)


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Within: Python collects no garbage. There may be memory among it that GPUs share, of a group that is gone, and to
    give that back while this thread captures ends the process."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def size_of(*tensors: Like) -> int:
    """Bytes that these take, each from a multiple of `_ALIGNMENT` on."""
    sizes = (math.prod(shape) * dtype.itemsize for shape, dtype in tensors)
    return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)


def _rendezvous(size: int, group: Any, device: torch.device) -> Any:
    """So many bytes of each rank, which all of them reach: a handle of torch's symmetric memory, and the own ones."""
    from torch.distributed import _symmetric_memory

    memory = _symmetric_memory.empty(size, dtype=torch.uint8, device=device)
    return _symmetric_memory.rendezvous(memory, group), memory


def _timeout(group: Any, device: torch.device) -> float:
    """Seconds."""
    return group._get_backend(device).options._timeout.total_seconds()
