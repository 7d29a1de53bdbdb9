"""What the ranks of a group send one another: rows and their results, keys, gradients of keys; chunk by chunk.

Every rank starts its exchanges in the same order, and each with one batch of sends and receives, which may be empty.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .chunk_plan import Plan

Step = tuple[int, int]  # (distance to who computes the chunk, which of its two); see `Plan.steps`
# Steps whose keys are on their way or in use, and steps whose gradients are on their way: with fewer a rank would wait
# for those that have more to do in a step than it has. `cost_model` counts on the first.
AT_ONCE = 3
RETURNS_AT_ONCE = 2


class Exchanges:
    """One rank's.

    Args:
        plan: who computes what.
        group: torch process group.
    """

    def __init__(self, plan: Plan, group: Any) -> None:
        self.plan, self.group = plan, group

    def rows(
        self, parts: dict[int, list[Tensor]], shapes: dict[int, list[Tensor]]
    ) -> tuple[dict[int, list[Tensor]], list[Any]]:
        """Chunks go from their owners to those who compute them: chunk -> tensors, once the works were waited for.

        Args:
            parts: of this rank's chunks.
            shapes: tensors like those of the chunks that this rank computes.
        """
        rows = enumerate(self.plan.rows)
        return self._move([(c, c // 2, worker) for worker, chunks in rows for c in chunks], parts, shapes)

    def results(
        self, parts: dict[int, list[Tensor]], shapes: dict[int, list[Tensor]]
    ) -> tuple[dict[int, list[Tensor]], list[Any]]:
        """The way back; as `rows`, with the chunks of both sides changed about."""
        rows = enumerate(self.plan.rows)
        return self._move([(c, worker, c // 2) for worker, chunks in rows for c in chunks], parts, shapes)

    def keys(
        self, steps: list[Step], held: dict[int, list[Tensor]], like: list[list[Tensor]], here: dict[Step, list[Tensor]]
    ) -> Iterator[tuple[Step, int, list[Tensor]]]:
        """The keys of each step. `AT_ONCE` steps' are sent for now; those of a later one when a step's are done with.

        Args:
            steps: of the plan, in any order, the same on all ranks.
            held: keys of the chunks that this rank computes.
            like: keys of both chunks of this rank's shard: they need not come back to it, and others have their shapes.
            here: steps for which nothing needs to be sent, the same on all ranks, and their keys. They are taken out.

        Yields:
            (step, chunk, keys), or (step, -1, []) where this rank needs none. Nothing here holds the keys any longer.
        """
        plan, had = self.plan, set(here)

        def begin(step: Step) -> list[Any]:
            if step in had:
                return []
            coming, going = plan.coming(step), plan.going(step)
            here[step], operations = [], []
            if coming is not None:
                source, chunk = coming
                here[step] = like[chunk % 2]
                if source != plan.rank:
                    here[step] = [room(x) for x in here[step]]
                    operations += [self.receive(x, source) for x in here[step]]
            if going is not None:
                operations += [self.send(x, going[0]) for x in held[going[1]]]
            return start(operations)

        works = deque(begin(step) for step in steps[:AT_ONCE])

        def arriving() -> Iterator[tuple[Step, int, list[Tensor]]]:
            for step, later in zip_longest(steps, steps[AT_ONCE:]):
                wait(works.popleft())
                _, chunk = plan.coming(step) or (-1, -1)
                yield step, chunk, here.pop(step)
                if later is not None:
                    works.append(begin(later))

        return arriving()

    def _move(
        self, moves: list[tuple[int, int, int]], parts: dict[int, list[Tensor]], shapes: dict[int, list[Tensor]]
    ) -> tuple[dict[int, list[Tensor]], list[Any]]:
        """Start (chunk, from, to) moves, in the same order on every rank; what stays is not copied."""
        rank, found, operations = self.plan.rank, {}, []
        for chunk, source, target in moves:
            if rank == target:
                found[chunk] = parts[chunk] if source == target else [room(x) for x in shapes[chunk]]
                if source != target:
                    operations += [self.receive(x, source) for x in found[chunk]]
            elif rank == source:
                operations += [self.send(x, target) for x in parts[chunk]]
        return found, start(operations)

    def send(self, x: Tensor, peer: int) -> dist.P2POp:
        """What `start` is to start; where x has gaps it holds a copy, which lives until the work was waited for."""
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
        self.pending: deque[tuple[list[Any], Tensor | None, int]] = deque()

    def send(self, step: Step, found: Tensor | None) -> None:
        """Send back a step's gradient, and take in the one that this rank's keys got in that step elsewhere."""
        if len(self.pending) == RETURNS_AT_ONCE:
            self._take_in()
        plan = self.exchanges.plan
        coming, going = plan.coming(step), plan.going(step)
        operations, incoming, chunk = [], None, 0
        if found is not None:
            assert coming is not None, step
            source, chunk = coming
            if source == plan.rank:
                self.kept[chunk] = found
            else:
                operations.append(self.exchanges.send(found, source))
        if going is not None:
            worker, chunk = going
            incoming = room(self.k_grads[chunk])
            operations.append(self.exchanges.receive(incoming, worker))
        self.pending.append((start(operations), incoming, chunk))

    def finish(self) -> None:
        """Wait for those of the last steps, and add them up."""
        while self.pending:
            self._take_in()

    def _take_in(self) -> None:
        works, incoming, chunk = self.pending.popleft()
        wait(works)
        if incoming is not None:
            self.k_grads[chunk] += incoming


def room(x: Tensor) -> Tensor:
    """For something of x's shape and type that comes in; contiguous, however x lies."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def start(operations: list[dist.P2POp]) -> list[Any]:
    """Works, each with all of the operations, which hold the tensors until `wait`, whether or not the works do."""
    operations = [operation for operation in operations if operation.tensor.numel() > 0]
    return [(work, operations) for work in dist.batch_isend_irecv(operations)] if operations else []


def wait(works: list[Any]) -> None:
    for work, _ in works:
        work.wait()
    works.clear()
