"""What the ranks of a group send one another: rows and their results, keys, gradients of keys; chunk by chunk.

Every rank starts its exchanges in the same order, and each with one batch of sends and receives, which may be empty.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .chunk_plan import Plan

# Steps whose keys are on their way or in use, and steps whose gradients are on their way. With one segment all ranks
# have as much to do in every step. `cost_model` counts on the first.
AT_ONCE = 2
RETURNS_AT_ONCE = 1


class Vectors(NamedTuple):
    """Keys of a chunk, or its queries."""

    student: Tensor  # [B, H, N, D]
    teacher: Tensor
    ids: Tensor | None = None  # of keys where there are segments: int64 [B, N]
    packed: Tensor | None = None  # [2, B, H, N, D], of which student and teacher are the parts

    def message(self) -> list[Tensor]:
        """What is sent: student and teacher as one, a copy if they do not lie that way."""
        packed = torch.stack((self.student, self.teacher)) if self.packed is None else self.packed
        return [packed, *([] if self.ids is None else [self.ids])]

    def room(self) -> Vectors:
        """For what comes in of such a chunk: its message is what is received."""
        packed = room(self.student, (2, *self.student.shape))
        return Vectors(packed[0], packed[1], None if self.ids is None else room(self.ids), packed)


Arrived = list[tuple[int, Vectors]]  # chunks and their keys


class Exchanges:
    """One rank's.

    Args:
        plan: who computes what.
        group: torch process group.
    """

    def __init__(self, plan: Plan, group: Any) -> None:
        self.plan, self.group = plan, group

    def rows(self, going: dict[int, list[Tensor]], coming: dict[int, list[Tensor]]) -> list[Any]:
        """Chunks go from their owners to those who compute them.

        Args:
            going: by chunk, of at least those of this rank's that another one computes.
            coming: what is received: of the chunks of other ranks that this one computes.

        Returns:
            Works that are to be waited for.
        """
        rows = enumerate(self.plan.rows)
        return self._move([(c, c // 2, worker) for worker, chunks in rows for c in chunks], going, coming)

    def results(self, going: dict[int, list[Tensor]], coming: dict[int, list[Tensor]]) -> list[Any]:
        """The way back; as `rows`, with the chunks of both sides changed about."""
        rows = enumerate(self.plan.rows)
        return self._move([(c, worker, c // 2) for worker, chunks in rows for c in chunks], going, coming)

    def keys(
        self, steps: Sequence[int], held: dict[int, Vectors], like: Sequence[Vectors], here: dict[int, Arrived]
    ) -> Iterator[tuple[int, Arrived]]:
        """The keys of each step. `AT_ONCE` steps' are sent for now; those of a later one when a step's are done with.

        Args:
            steps: of the plan, in any order, the same on all ranks.
            held: keys of the chunks that this rank computes.
            like: keys of both chunks of this rank's shard: they need not come back to it, and others have their shapes.
            here: steps for which nothing needs to be sent, the same on all ranks, and their keys. They are taken out.

        Yields:
            (step, (chunk, keys) of each that this rank needs). Nothing here holds the keys any longer.
        """
        plan, left = self.plan, [step for step in steps if step not in here]
        messages: dict[int, list[Tensor]] = {}  # each is copied once, and kept until it was sent to all

        def begin(step: int) -> list[Any]:
            if step not in left:
                return []
            here[step], operations = [], []
            for source, chunk in plan.coming(step):
                keys = like[chunk % 2]
                if source != plan.rank:
                    keys = keys.room()
                    operations += [self.receive(x, source) for x in keys.message()]
                here[step].append((chunk, keys))
            for worker, chunk in plan.going(step):
                if chunk not in messages:
                    messages[chunk] = held[chunk].message()
                operations += [self.send(x, worker) for x in messages[chunk]]
            if step == left[-1]:
                messages.clear()
            return start(operations)

        works = deque(begin(step) for step in steps[:AT_ONCE])

        def arriving() -> Iterator[tuple[int, Arrived]]:
            for step, later in zip_longest(steps, steps[AT_ONCE:]):
                wait(works.popleft())
                yield step, here.pop(step)
                if later is not None:
                    works.append(begin(later))

        return arriving()

    def _move(
        self, moves: list[tuple[int, int, int]], going: dict[int, list[Tensor]], coming: dict[int, list[Tensor]]
    ) -> list[Any]:
        """Start (chunk, from, to) moves, in the same order on every rank, but those that lead nowhere."""
        rank, operations = self.plan.rank, []
        for chunk, source, target in moves:
            if source != target and rank == target:
                operations += [self.receive(x, source) for x in coming[chunk]]
            elif source != target and rank == source:
                operations += [self.send(x, target) for x in going[chunk]]
        return start(operations)

    def send(self, x: Tensor, peer: int) -> dist.P2POp:
        """What `start` is to start; a copy, if x has gaps. It holds what is sent until the work was waited for."""
        return dist.P2POp(dist.isend, x.contiguous(), group=self.group, group_peer=peer)

    def receive(self, x: Tensor, peer: int) -> dist.P2POp:
        """What `start` is to start."""
        return dist.P2POp(dist.irecv, x, group=self.group, group_peer=peer)


class Returns:
    """Gradients of fetched keys on their way back, and those of this rank's keys coming in, some steps behind.

    Args:
        exchanges: this rank's.
        k_grads: the gradients of the chunks that this rank computes, to which what comes in is added, in the order of
            the steps.

    Attributes:
        kept: gradients of chunks of this rank's own shard that another one computes: its own part of the results.
    """

    def __init__(self, exchanges: Exchanges, k_grads: dict[int, Tensor]) -> None:
        self.exchanges, self.k_grads = exchanges, k_grads
        self.kept: dict[int, Tensor] = {}
        self.pending: deque[tuple[list[Any], list[tuple[int, Tensor]]]] = deque()

    def send(self, step: int, found: dict[int, Tensor]) -> None:
        """Send back a step's gradients, by chunk, and take in what this rank's keys got in that step elsewhere."""
        if len(self.pending) == RETURNS_AT_ONCE:
            self._take_in()
        exchanges, plan = self.exchanges, self.exchanges.plan
        operations, incoming = [], []
        for source, chunk in plan.coming(step):
            if source == plan.rank:
                self.kept[chunk] = found[chunk]
            else:
                operations.append(exchanges.send(found[chunk], source))
        for worker, chunk in plan.going(step):
            incoming.append((chunk, room(self.k_grads[chunk])))
            operations.append(exchanges.receive(incoming[-1][1], worker))
        self.pending.append((start(operations), incoming))

    def finish(self) -> None:
        """Wait for those of the last steps, and add them up."""
        while self.pending:
            self._take_in()

    def _take_in(self) -> None:
        works, incoming = self.pending.popleft()
        wait(works)
        for chunk, gradient in incoming:
            self.k_grads[chunk] += gradient


def room(x: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """For something of x's type, and of its shape or another, that comes in; contiguous, however x lies."""
    return torch.empty(x.shape if shape is None else shape, dtype=x.dtype, device=x.device)


def start(operations: list[dist.P2POp]) -> list[Any]:
    """Works, each with all of the operations, which hold the tensors until `wait`, whether or not the works do."""
    operations = [operation for operation in operations if operation.tensor.numel() > 0]
    return [(work, operations) for work in dist.batch_isend_irecv(operations)] if operations else []


def wait(works: list[Any]) -> None:
    for work, _ in works:
        work.wait()
    works.clear()
