"""Who computes what of a sequence that is sharded over ranks: chunks of rows, the keys that each needs, heads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .torch_backend import Operands

# Tokens of a tile, of rows or of keys.
_TILE = 128
# Pairs of tiles of a long visit: 4 ms forward on an H200 at 128 channels. To begin an exchange takes the host, and the
# other rank until it takes part, some tenths of one (figures in TRIED.md).
_LONG_VISIT = 2**18
# For this many groups of heads, two of which take less memory than their share of one GPU's, visits may be shorter.
_GROUPS, _SHORT_VISIT = 8, 2**16
# Those that a CUDA graph issues may be shorter still, and more; with less, programs of a visit do not fill the GPU.
_CAPTURED_GROUPS, _CAPTURED_VISIT = 16, 10_000
# Two groups are worked on at a time: with fewer in all, little memory is saved.
_LEAST_GROUPS = 4


@dataclass(frozen=True)
class Plan:
    """Who computes what; the same on every rank. Chunks are numbered along the sequence, two a rank.

    Attributes:
        rank: this one, in the group.
        ranks: P.
        lengths: tokens of a rank's first and second chunk.
        rows: for each rank the two chunks whose rows it computes, in order; their keys are there, too.
        sees: [2 P, 2 P] bool as nested lists: whether a chunk's rows may see a chunk's keys.
    """

    rank: int
    ranks: int
    lengths: tuple[int, int]
    rows: list[list[int]]
    sees: list[list[bool]]

    @property
    def own(self) -> tuple[int, int]:
        """The chunks of this rank's shard."""
        return 2 * self.rank, 2 * self.rank + 1

    @property
    def row_lengths(self) -> list[int]:
        """Tokens of the chunks whose rows this rank computes."""
        return [self.lengths[chunk % 2] for chunk in self.rows[self.rank]]

    @property
    def steps(self) -> range:
        """Distances to the ranks whose keys are visited, in the order of the visits."""
        return range(1, self.ranks)

    def fetches(self, worker: int, chunk: int) -> bool:
        """Whether `worker` takes the chunk's keys in a step: rows that it computes may see them, and it does not
        compute the chunk itself."""
        return chunk not in self.rows[worker] and any(self.sees[row][chunk] for row in self.rows[worker])

    def coming(self, step: int) -> list[tuple[int, int]]:
        """(from, chunk) of the keys that this rank takes in a step; those of its own shard are from itself."""
        source = (self.rank - step) % self.ranks
        return [(self.rank if chunk in self.own else source, chunk) for chunk in self.fetched(self.rank, source)]

    def going(self, step: int) -> list[tuple[int, int]]:
        """(to, chunk) of the keys that another rank takes from this one in a step."""
        worker = (self.rank + step) % self.ranks
        return [(worker, chunk) for chunk in self.fetched(worker, self.rank) if chunk // 2 != worker]

    def worker(self, chunk: int) -> int:
        """Who computes its rows."""
        return next(worker for worker, chunks in enumerate(self.rows) if chunk in chunks)

    def fetched(self, worker: int, source: int) -> list[int]:
        """The chunks that `source` computes whose keys `worker` takes from there, those of its own shard among them."""
        return [chunk for chunk in self.rows[source] if self.fetches(worker, chunk)]

    def fetched_before(self, worker: int, step: int) -> int:
        """How many `worker` takes in backward before it comes to that step."""
        return sum(len(self.fetched(worker, (worker - later) % self.ranks)) for later in self.steps[step:])

    def span(self, chunk: int) -> slice:
        """Where a chunk lies in its owner's shard."""
        first, second = self.lengths
        return slice(0, first) if chunk % 2 == 0 else slice(first, first + second)


def make_plan(operands: Operands, segment_ids: Tensor | None, group: Any) -> Plan | None:
    """Who computes what, or None where no segment reaches beyond its shard; waits for the device once.

    Args:
        operands: this rank's shard.
        segment_ids: of the shard, [B, T], or None.
        group: torch process group.

    Raises:
        ValueError: shards of unequal length; not checked on a GPU without segment_ids, where nothing is gathered.
    """
    q, rank, ranks = operands.student_q, dist.get_rank(group), dist.get_world_size(group)
    lengths, chunks = ((q.shape[2] + 1) // 2, q.shape[2] // 2), range(2 * ranks)
    if segment_ids is None:
        if q.device.type == "cpu":
            gathered = list(torch.zeros(ranks, 1, dtype=torch.int64))
            dist.all_gather(gathered, torch.tensor([q.shape[2]]), group=group)
            _check_lengths([int(length) for length in gathered])
        elif ranks > 1 and ranks % 2:
            # The one in the middle computes its own rows only. NCCL wants all ranks in a group's first exchange.
            dist.all_reduce(torch.zeros(1, device=q.device), group=group)
        return _one_segment(rank, ranks, lengths)
    ranges = [id_range(part) for part in segment_ids.split(lengths[0], 1)]
    if lengths[1] == 0:
        ranges.append(id_range(segment_ids[:, :0]))
    mine = torch.stack([*ranges, torch.full_like(ranges[0], q.shape[2])])
    gathered = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(gathered, mine, group=group)
    found = torch.stack(gathered).cpu()
    _check_lengths(found[:, 2, 0, 0].tolist())
    low, high = found[:, :2].flatten(0, 1).unbind(-1)  # [2 P, B]
    meet = ((low[:, None] <= high[None]) & (high[:, None] >= low[None])).any(-1).tolist()
    return _plan(rank, ranks, lengths, [[c <= r and meet[r][c] for c in chunks] for r in chunks])


@lru_cache
def _one_segment(rank: int, ranks: int, lengths: tuple[int, int]) -> Plan | None:
    """Every row sees all that lies before it."""
    sees = [[c <= r and lengths[c % 2] > 0 and lengths[r % 2] > 0 for c in range(2 * ranks)] for r in range(2 * ranks)]
    return _plan(rank, ranks, lengths, sees)


def _plan(rank: int, ranks: int, lengths: tuple[int, int], sees: list[list[bool]]) -> Plan | None:
    """By what chunks may see; see `make_plan`."""
    chunks = range(2 * ranks)
    if not any(sees[r][c] for r in chunks for c in chunks if r // 2 != c // 2):
        return None
    # The chunk with the most to see beside the one with the least, and so on. Of each two pairs, one goes to the
    # owner of its lesser chunk and the next to that of its greater one, as far as those are free.
    cost = [sum(row) - 0.5 * row[i] for i, row in enumerate(sees)]
    order = sorted(chunks, key=lambda c: (cost[c], c))
    rows: list[list[int]] = [[] for _ in range(ranks)]
    free = set(range(ranks))
    for i in range(ranks):
        less, more = order[i], order[-1 - i]
        wanted = (less // 2, more // 2) if i % 2 == 0 else (more // 2, less // 2)
        worker = next((w for w in wanted if w in free), min(free))
        free.remove(worker)
        rows[worker] = sorted((less, more))
    return Plan(rank, ranks, lengths, rows, sees)


def head_groups(
    heads: int, key_heads: int, batch: int, rows: int, forward: bool = False, captured: bool = False
) -> list[tuple[slice, slice]]:
    """Query heads and their key heads that are worked on together; groups differ by one key head at most.

    Args:
        heads: H.
        key_heads: Hkv.
        batch: B.
        rows: of the longer chunk.
        forward: there is no backward pass, which takes twice the time and the memory of a forward pass.
        captured: visits are issued by a graph: the host has little to do for a group.
    """
    shared, groups = heads // key_heads, count_groups(heads, key_heads, batch, rows, captured)
    if forward:
        groups = -(-groups // 2)
    ends = [key_heads * i // groups for i in range(groups + 1)]
    return [(slice(i * shared, j * shared), slice(i, j)) for i, j in pairwise(ends)]


def count_groups(heads: int, key_heads: int, batch: int, rows: int, captured: bool) -> int:
    """Groups of heads with a backward pass: one, or an even number, for two are worked on at a time.

    As many as leave visits long beside their exchanges, or, where these would be fewer than `_GROUPS`, as leave them
    long enough; less than `_LEAST_GROUPS` are one, but where visits are captured. The number is the same on all ranks,
    and on all devices. Arguments as for `head_groups`.
    """
    pairs = batch * heads * (-(-rows // _TILE)) ** 2

    def most(visit: int, limit: int) -> int:
        groups = min(pairs // visit, limit, key_heads)
        return max(1, groups - groups % 2)

    if captured:
        return most(_CAPTURED_VISIT, _CAPTURED_GROUPS)
    groups = max(most(_LONG_VISIT, key_heads), most(_SHORT_VISIT, _GROUPS))
    return groups if groups >= _LEAST_GROUPS else 1


def _check_lengths(lengths: list[int]) -> None:
    """Of the shards, in the order of the ranks."""
    if len(set(lengths)) > 1:
        raise ValueError(
            f"student has T = {', '.join(map(str, lengths))} on the ranks of group; T must be equal on all"
        )


def id_range(ids: Tensor) -> Tensor:
    """[B, 2]: the least and the largest id that is not negative; the least above the largest where there is none."""
    if ids.shape[1] == 0:
        return torch.tensor([2**62, -1], device=ids.device).expand(ids.shape[0], 2).contiguous()
    ids = ids.long()
    return torch.stack([torch.where(ids >= 0, ids, 2**62).amin(1), ids.amax(1).clamp(min=-1)], -1)
