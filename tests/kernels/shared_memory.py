"""torch's symmetric memory between processes on a CPU: what `relation_kl.peer_memory` needs of it, in mapped files."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from relation_kl import peer_memory
from torch import Tensor

_CHANNELS = 16
_numbers = itertools.count()
_WAIT = 60.0  # seconds


class Handle:
    """Of memory of each rank: a file for what it holds, and one for its signals, int32 [channels, ranks]."""

    def __init__(self, folder: Path, size: int, group: Any) -> None:
        self.group, self.rank, self.ranks = group, dist.get_rank(group), dist.get_world_size(group)
        number = next(_numbers)
        names = [str(folder / f"{number}-{rank}") for rank in range(self.ranks)]
        signals = _CHANNELS * self.ranks
        (mine := Path(names[self.rank])).write_bytes(bytes(size))
        mine.with_suffix(".signals").write_bytes(bytes(4 * signals))
        dist.barrier(group)
        self.memory = [torch.from_file(name, True, size, dtype=torch.uint8) for name in names]
        files = [f"{name}.signals" for name in names]
        self.signals = [torch.from_file(x, True, signals, dtype=torch.int32).view(-1, self.ranks) for x in files]

    def get_buffer(self, rank: int, sizes: Sequence[int], dtype: torch.dtype, storage_offset: int) -> Tensor:
        begin = storage_offset * dtype.itemsize
        count = torch.Size(sizes).numel() * dtype.itemsize
        assert begin + count <= len(self.memory[rank])
        return self.memory[rank][begin : begin + count].view(dtype).view(sizes)

    def put_signal(self, dst_rank: int, channel: int, timeout_ms: int) -> None:
        self._change(dst_rank, channel, self.rank, 0, 1)

    def wait_signal(self, src_rank: int, channel: int, timeout_ms: int) -> None:
        self._change(self.rank, channel, src_rank, 1, 0)

    def barrier(self, channel: int, timeout_ms: int) -> None:
        others = [rank for rank in range(self.ranks) if rank != self.rank]
        for rank in others:
            self.put_signal(rank, channel, timeout_ms)
        for rank in others:
            self.wait_signal(rank, channel, timeout_ms)

    def _change(self, rank: int, channel: int, column: int, before: int, after: int) -> None:
        begin, signal = time.monotonic(), self.signals[rank][channel]
        while int(signal[column]) != before:
            assert time.monotonic() < begin + _WAIT, (self.rank, rank, channel, before)
            time.sleep(0)
        signal[column] = after


@contextmanager
def shared_memory(folder: Path) -> Iterator[list[Handle]]:
    """Within: the ranks of a group on a CPU reach one another's memory, which is in the list."""
    reach: dict[Any, peer_memory.Reach] = {}
    handles: list[Handle] = []

    def of_group(group: Any, device: torch.device) -> peer_memory.Reach:
        if group not in reach:
            reach[group] = peer_memory.Reach(group, device)
        return reach[group]

    def rendezvous(size: int, group: Any, device: torch.device) -> Any:
        handles.append(Handle(folder, size, group))
        return handles[-1], None

    fakes: dict[str, Any] = {"of_group": of_group, "_rendezvous": rendezvous, "_timeout": lambda *which: _WAIT}
    with patch.multiple(peer_memory, **fakes):
        yield handles
