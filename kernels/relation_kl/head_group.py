"""What a rank has of one group of heads: operands, chunks that it computes, its part of the results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import zip_longest
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import exchanges
from .chunk_plan import Plan, head_groups
from .exchanges import Arrived, Exchanges, Vectors
from .torch_backend import Operands
from .torch_visit import Visit, working

Heads = tuple[slice, slice]  # of the rows and of the keys


class Rows(NamedTuple):
    """What a rank knows of a chunk."""

    chunk: int
    queries: Vectors
    keys: Vectors  # in a self-relation the queries
    # [n, B, H, R]: in forward the pivots of student and teacher, and, where backward follows, the upstream gradient; in
    # backward the upstream gradient.
    numbers: Tensor

    def message(self) -> list[Tensor]:
        """What is sent of it."""
        of_queries = [] if self.queries is self.keys else self.queries.message()
        return [self.numbers, *of_queries, *self.keys.message()]

    def room(self, chunk: int) -> Rows:
        """For what comes in of another chunk of this length: its message is what is received."""
        keys = self.keys.room()
        queries = keys if self.queries is self.keys else self.queries.room()
        return Rows(chunk, queries, keys, exchanges.room(self.numbers))


@dataclass
class Job:
    """What this rank does for a group of heads: the chunks that it computes.

    Attributes:
        exchanges: this rank's, with the plan.
        own: those of its own shard; vectors are views of the caller's tensors.
        foreign: those of other shards; not to be looked at before `works` were waited for.
        works: what brings them.
        like: keys of both chunks of its own shard.
        held: for the last steps of the forward pass the keys that came, where the backward pass follows.
        results: for each chunk whose rows this rank computes, what is to go to the chunk's owner.
    """

    exchanges: Exchanges
    own: list[Rows]
    foreign: list[Rows]
    works: list[Any]
    like: list[Vectors]
    held: dict[int, Arrived] = field(default_factory=dict)
    results: dict[int, list[Tensor]] = field(default_factory=dict)

    @property
    def plan(self) -> Plan:
        return self.exchanges.plan

    @property
    def rows(self) -> list[Rows]:
        """Both, in the order of the plan, in which statistics are kept."""
        return sorted(self.own + self.foreign, key=lambda rows: rows.chunk)

    @property
    def keys(self) -> dict[int, Vectors]:
        return {each.chunk: each.keys for each in self.rows}

    def visits(self, keys: Vectors, chunk: int, rows: Sequence[Rows]) -> Iterator[tuple[Rows, Visit]]:
        """The visits of the chunk by those rows that may see it."""
        for each in rows:
            if self.plan.sees[each.chunk][chunk]:
                vectors = each.queries.student, each.queries.teacher, keys.student, keys.teacher
                yield each, Visit(*vectors, each.keys.ids, keys.ids, each.chunk == chunk)


def by_heads(
    plan: Plan,
    operands: Operands,
    segment_ids: Tensor | None,
    work: Callable[..., Iterator[None]],
    forward: bool = False,
) -> None:
    """Runs `work(operands, heads, key_heads, ids)` for each group of heads, see `head_groups` and `take_turns`."""
    q, k = operands.student_q, operands.student_k
    ids = None if segment_ids is None else segment_ids.long()
    groups = head_groups(q.shape[1], k.shape[1], q.shape[0], plan.lengths[0], forward)
    pieces = []
    for heads, key_heads in groups:
        if operands.self_relation:  # `own_logits` asks whether queries and keys are the same tensor
            x, y = q[:, heads], operands.teacher_q[:, heads]
            part = Operands(x, x, y, y, True)
        else:
            q_t, k_t = operands.teacher_q, operands.teacher_k
            part = Operands(q[:, heads], k[:, key_heads], q_t[:, heads], k_t[:, key_heads], False)
        pieces.append(work(part, heads, key_heads, ids))
    if q.device.type == "cuda" and len(pieces) > 1:
        here, beside = torch.cuda.current_stream(q.device), second_stream(q.device)
        beside.wait_stream(here)
        try:
            take_turns(pieces, beside)
        finally:
            here.wait_stream(beside)
    else:
        take_turns(pieces)


@lru_cache
def second_stream(device: torch.device) -> torch.cuda.Stream:
    """One for good: memory that was freed on a stream is for that stream only."""
    return torch.cuda.Stream(device)


def take_turns(pieces: Sequence[Iterator[None]], beside: torch.cuda.Stream | None = None) -> None:
    """Runs all pieces to their end, two at a time, the first one a turn ahead.

    A piece yields twice: when its rows are on their way, and when it is about to wait for them. Then the host starts
    what another piece has to do until that has come to its end, or would wait, and so on: in an order that depends only
    on the number of pieces.

    Args:
        pieces: what is to be done; they share nothing that one of them writes.
        beside: the stream of every other piece, so that a kernel of one piece begins where the last programs of one of
            the other leave multiprocessors idle; None for the current stream.
    """
    first, second = (_one_after_the_other(pieces[begin::2]) for begin in (0, 1))

    def turn(piece: Iterator[None], stream: torch.cuda.Stream | None) -> bool:
        """Whether there is more to do."""
        with torch.cuda.stream(stream):
            return next(piece, "done") is None

    turn(first, None)
    while any([turn(second, beside), turn(first, None)]):
        pass


def _one_after_the_other(pieces: Sequence[Iterator[None]]) -> Iterator[None]:
    """Yields where it is another piece's turn.

    When a piece has come to its end, the next one's rows are sent for at once: exchanges are executed in the order in
    which they are issued, and behind those of the other piece they would have to wait until that has computed.
    """
    for piece, following in zip_longest(pieces, pieces[1:]):
        if piece is pieces[0]:
            next(piece)
        next(piece)
        yield
        next(piece, None)
        if following is not None:
            next(following)
            yield


def halves(heads: int, key_heads: int) -> tuple[list[Heads], list[Heads]]:
    """The heads in two parts that need nothing of one another; in the second one only, where there is one key head."""
    half, shared = key_heads // 2, heads // key_heads
    first, second = (
        (slice(low * shared, high * shared), slice(low, high)) for low, high in ((0, half), (half, key_heads))
    )
    return [first] if half else [], [second]


def empty_gradients(operands: Operands) -> tuple[Tensor, Tensor | None]:
    q, k = operands.student_q, operands.student_k
    of_keys = None if operands.self_relation else torch.empty(k.shape, dtype=k.dtype, device=k.device)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), of_keys


def upstream_of(
    operands: Operands, scale: float, segment_ids: Tensor | None, row_grad: Tensor, visits: ModuleType, group: Any
) -> tuple[Tensor, Tensor | None]:
    """The upstream gradient as visits take it, 0 for padding, which may be anything; see `torch_visit.prepare`."""
    row_grad = row_grad.to(working(operands.student_q))
    if segment_ids is not None:
        row_grad = torch.where((segment_ids >= 0)[:, None], row_grad, 0.0)
    return visits.prepare(row_grad, operands.student_q.dtype, scale, group)


def of_heads(grads: tuple[Tensor, Tensor | None], heads: slice, key_heads: slice) -> tuple[Tensor, Tensor | None]:
    return grads[0][:, heads], None if grads[1] is None else grads[1][:, key_heads]
