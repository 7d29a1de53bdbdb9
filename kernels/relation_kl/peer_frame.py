"""Where what belongs to a group of heads lies in memory that all ranks reach: the same place for every such group."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .chunk_plan import Plan
from .exchanges import Vectors
from .peer_memory import Lane, Like, size_of
from .torch_visit import Visit, working

_FETCHED = 2  # chunks of keys that are here or on their way


class Shapes(NamedTuple):
    """Of a group of heads."""

    batch: int
    heads: int
    key_heads: int
    channels: int
    dtype: torch.dtype
    self_relation: bool
    segments: bool


@dataclass
class Frame:
    """Where what belongs to a group of heads lies.

    Args:
        plan: who computes what.
        lane: where in the memory.
        shapes: of the group.
        visits: `torch_visit`, or the module that computes like it.
    """

    plan: Plan
    lane: Lane
    shapes: Shapes
    visits: ModuleType
    graphs: dict[Any, Any] = field(default_factory=dict)
    _views: dict[Any, Tensor] = field(default_factory=dict)
    _of_chunks: dict[Any, Vectors] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._like = [self._likes(tokens) for tokens in self.plan.lengths]
        one, longest = self._like[0], ["keys", "upstream", "values", "q_grad"]
        longest += [] if self.shapes.self_relation else ["queries", "k_grad"]
        longest += ["ids"] if self.shapes.segments else []
        every = [(name, i) for i in (0, 1) for name in longest] + [("found", 0), ("found", 1)]
        own = [(name, i) for i in (0, 1) for name in ("m", "total")] + [("incoming", 0)]
        fetched = ("fetched", "fetched ids") if self.shapes.segments else ("fetched",)
        own += [(name, i) for i in range(_FETCHED) for name in fetched]
        self._offsets, sizes = {}, []
        for places in (every, own):
            size = 0
            for name, i in places:
                self._offsets[name, i] = size
                size += size_of(one[name])
            sizes.append(size)
        self._own = {name for name, _ in own}
        self.lane.reach.reserve(self.lane.number, *sizes)

    def _likes(self, tokens: int) -> dict[str, Like]:
        """Of a chunk of so many."""
        batch, heads, key_heads, channels, dtype, *_ = self.shapes
        rows, keys = (batch, heads, tokens, channels), (batch, key_heads, tokens, channels)
        blank = torch.empty(1, dtype=dtype, device=self.lane.reach.device)
        kind = working(blank)
        of_rows, of_keys = ((self.visits.gradient_shape(blank.expand(shape)), kind) for shape in (rows, keys))
        ids, numbers = ((batch, tokens), torch.int64), ((batch, heads, tokens), kind)
        statistics = (2, batch, heads, tokens), kind
        return {
            "keys": ((2, *keys), dtype),
            "queries": ((2, *rows), dtype),
            "ids": ids,
            "upstream": numbers,
            "values": numbers,
            "q_grad": of_rows,
            "k_grad": of_keys,
            "found": of_keys,
            "m": statistics,
            "total": statistics,
            "fetched": ((2, *keys), dtype),
            "fetched ids": ids,
            "incoming": of_rows if heads > key_heads else of_keys,
        }

    @property
    def rank(self) -> int:
        return self.plan.rank

    @property
    def mine(self) -> list[int]:
        """The chunks whose rows this rank computes."""
        return self.plan.rows[self.rank]

    def at(self, name: str, chunk: int, rank: int | None = None, place: int | None = None) -> Tensor:
        """A chunk's tensor of this name in a rank's memory, this one's if it is not said, in one of the two places:
        the chunk's, if it is not said."""
        rank = self.rank if rank is None else rank
        place = self.plan.rows[rank].index(chunk) if place is None else place
        key = name, chunk % 2, rank, place
        if key not in self._views:
            like = self._like[chunk % 2][name]
            where = None if name in self._own else rank
            self._views[key] = self.lane.at(where, self._offsets[name, place], like)
        return self._views[key]

    def incoming(self, chunk: int, like: Tensor) -> Tensor:
        """For a gradient of the chunk like that."""
        key = "incoming", chunk % 2, like.shape
        if key not in self._views:
            self._views[key] = self.lane.at(None, self._offsets["incoming", 0], (like.shape, like.dtype))
        return self._views[key]

    def keys(self, chunk: int, rank: int | None = None) -> Vectors:
        """Of a chunk that the rank computes."""
        return self._vectors("keys", "ids", chunk, rank, None)

    def queries(self, chunk: int) -> Vectors:
        """Of one that this rank computes."""
        if self.shapes.self_relation:
            return self.keys(chunk)
        return self._vectors("queries", "ids", chunk, None, None)

    def fetched(self, chunk: int, number: int) -> Vectors:
        """For the keys of another rank's chunk, the number-th."""
        return self._vectors("fetched", "fetched ids", chunk, None, number % _FETCHED)

    def _vectors(self, packed: str, ids: str, chunk: int, rank: int | None, place: int | None) -> Vectors:
        key = packed, chunk, rank, place
        if key not in self._of_chunks:
            both = self.at(packed, chunk, rank, place)
            names = self.at(ids, chunk, rank, place) if self.shapes.segments else None
            self._of_chunks[key] = Vectors(both[0], both[1], names, both)
        return self._of_chunks[key]

    def fetch(self, steps: Sequence[int]) -> Iterator[tuple[int, Vectors]]:
        """Chunks and keys that this rank needs of others, in these steps; each is good until the next but one is asked
        for. The first ones are on their way when this returns."""
        plan, lane, marks = self.plan, self.lane, deque[Any]()
        sources = [(self.rank - step) % plan.ranks for step in steps]
        order = [(source, chunk) for source in sources for chunk in plan.fetched(self.rank, source)]

        def begin(number: int) -> None:
            if number < len(order):
                source, chunk = order[number]
                into, there = self.fetched(chunk, number), self.keys(chunk, source)
                with lane.beside():
                    for x, y in zip(into.message(), there.message(), strict=True):
                        lane.copy(x, y)
                marks.append(lane.mark())

        for number in range(_FETCHED):
            begin(number)

        def arriving() -> Iterator[tuple[int, Vectors]]:
            for number, (_, chunk) in enumerate(order):
                lane.wait(marks.popleft())
                yield chunk, self.fetched(chunk, number)
                begin(number + _FETCHED)

        return arriving()

    def visits_of(self, chunk: int, keys: Vectors) -> Iterator[tuple[int, Visit]]:
        """The visits of a chunk's keys by the rows that this rank computes and that may see them."""
        for row in self.mine:
            if self.plan.sees[row][chunk]:
                q, ids = self.queries(row), self.keys(row).ids
                yield row, Visit(q.student, q.teacher, keys.student, keys.teacher, ids, keys.ids, row == chunk)
