"""The sequence-parallel form: contiguous shards of one long sequence, keys fetched from their owners shard by shard.

A shard is cut into two chunks, and rows are computed by chunks: every rank works on one chunk with few keys and one
with many, so that all work alike (with one segment: chunks w and 2 P - 1 - w, as in zigzag sharding). In step d a rank
holds the keys of the rank d before it, while those of step d + 1 are on their way; chunks that none of its rows can
see are neither sent nor computed. Statistics stay with the rows. In backward the gradient of fetched keys goes back to
their owner in float32, where it is added up in the order of the steps. A rank holds its own shard, the rows that it
computes (as many again), the keys of one step and of the next, and what is on its way out: memory O(T), T the local
length, whatever P is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .torch_backend import Operands
from .torch_visit import State, Visit, own_logits


class _Rows(NamedTuple):
    """What a rank knows of a chunk whose rows it computes."""

    q_s: Tensor  # [B, H, R, D]
    q_t: Tensor
    ids: Tensor | None  # [B, R]
    others: list[Tensor]  # [B, H, R]: for forward the pivots of student and teacher, for backward the upstream gradient


@dataclass(frozen=True)
class _Plan:
    """Who computes what; the same on every rank. Chunks are numbered along the sequence, two a rank.

    Attributes:
        rank: this one, in the group.
        ranks: P.
        lengths: tokens of a rank's first and second chunk.
        rows: for each rank the chunks whose rows it computes, in order.
        sees: [2 P, 2 P] bool as nested lists: whether a chunk's rows may see a chunk's keys.
    """

    rank: int
    ranks: int
    lengths: tuple[int, int]
    rows: list[list[int]]
    sees: list[list[bool]]

    def keys(self, worker: int, owner: int) -> list[int]:
        """The chunks of `owner` that rows of `worker` may see."""
        return [c for c in (2 * owner, 2 * owner + 1) if any(self.sees[r][c] for r in self.rows[worker])]

    def span(self, chunk: int) -> slice:
        """Where a chunk lies in its owner's shard."""
        first, second = self.lengths
        return slice(0, first) if chunk % 2 == 0 else slice(first, first + second)


def _exactly(function: Callable[..., Any]) -> Callable[..., Any]:
    """Without autograd, and in the precision written down, as the torch backend computes."""

    @functools.wraps(function)
    def wrapped(self: Any, operands: Operands, *arguments: Any) -> Any:
        with torch.no_grad(), torch.autocast(operands.student_q.device.type, enabled=False):
            return function(self, operands, *arguments)

    return wrapped


class SequenceParallel:
    """A backend over the ranks of a group, with the methods of the backend modules.

    Args:
        group: torch process group; its ranks hold the shards in order.
        local: the backend module that computes where no segment reaches beyond its shard.
        visits: `torch_visit`, or the module that computes like it.
    """

    def __init__(self, group: Any, local: ModuleType, visits: ModuleType) -> None:
        self.group, self.local, self.visits = group, local, visits

    @_exactly
    def forward(
        self, operands: Operands, softmax_scale: float, segment_ids: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Rows [B, H, T] of this rank's shard, and statistics of the rows that it computed."""
        plan = self._plan(operands.student_q, segment_ids)
        if plan is None:
            return self.local.forward(operands, softmax_scale, segment_ids)
        q_s, k_s, q_t, k_t, _ = operands
        pivots = [own_logits(q, k, softmax_scale, segment_ids) for q, k in ((q_s, k_s), (q_t, k_t))]
        rows = self._fetch_rows(plan, operands, segment_ids, pivots)
        states = [State.start(mine.others[0], mine.others[1]) for mine in rows]
        for _, keys in self._fetch_keys(plan, operands, segment_ids):
            for i, _, visit in _visits(plan, rows, keys):
                states[i].add(self.visits.forward(visit, softmax_scale, (rows[i].others[0], rows[i].others[1])))
            visit = None  # it holds keys
            keys.clear()
        results = [state.rows(mine.ids) for mine, state in zip(rows, states, strict=True)]
        values = self._return_rows(plan, results, operands.student_q.shape[:3])
        return values, tuple(torch.cat(each, 2) for each in zip(*(state.statistics() for state in states), strict=True))

    @_exactly
    def backward(
        self,
        operands: Operands,
        softmax_scale: float,
        segment_ids: Tensor | None,
        statistics: Sequence[Tensor],
        row_grad: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of this rank's student_q and student_k for the sum over all ranks; see the backend modules."""
        plan = self._plan(operands.student_q, segment_ids)
        if plan is None:
            return self.local.backward(operands, softmax_scale, segment_ids, statistics, row_grad)
        q, k = operands.student_q, operands.student_k
        rows = self._fetch_rows(plan, operands, segment_ids, [row_grad.to(_working(q))])
        lengths = [mine.q_s.shape[2] for mine in rows]
        of_rows = list(zip(*(x.split(lengths, 2) for x in statistics), strict=True))
        # Before the visits divide by them: a padding row's gradient may be anything.
        gradients = [
            g if mine.ids is None else torch.where((mine.ids >= 0)[:, None], g, 0.0)
            for mine in rows
            for g in mine.others
        ]
        gradients, unit = self.visits.prepare(gradients, q.dtype, softmax_scale)
        q_grads = [torch.zeros_like(mine.q_s, dtype=_working(q)) for mine in rows]
        k_grad = torch.zeros(k.shape, dtype=_working(k), device=k.device)
        returns = _Returns(self, plan, k_grad)
        for owner, keys in self._fetch_keys(plan, operands, segment_ids):
            found = {chunk: torch.zeros_like(k_s, dtype=_working(k_s)) for chunk, (k_s, *_) in keys.items()}
            for i, chunk, visit in _visits(plan, rows, keys):
                self.visits.backward(visit, softmax_scale, of_rows[i], gradients[i], q_grads[i], found[chunk])
            visit = None  # it holds keys
            keys.clear()
            for grad in found.values() if unit is not None else ():
                grad.mul_(unit)
            returns.send(owner, found)
        returns.finish()
        if unit is not None:
            for grad in q_grads:
                grad.mul_(unit)
        q_grad = self._return_rows(plan, q_grads, q.shape)
        if operands.self_relation:
            return q_grad.add_(k_grad).to(q.dtype), None
        return q_grad.to(q.dtype), k_grad.to(k.dtype)

    def value_and_grad(
        self, operands: Operands, softmax_scale: float, segment_ids: Tensor | None, row_grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rows and both gradients, by the two passes."""
        rows, statistics = self.forward(operands, softmax_scale, segment_ids)
        grad_q, grad_k = self.backward(operands, softmax_scale, segment_ids, statistics, row_grad)
        return rows, grad_q, grad_k

    def _plan(self, q: Tensor, segment_ids: Tensor | None) -> _Plan | None:
        """Who computes what, or None where no segment reaches beyond its shard; waits for the device once."""
        rank, ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        lengths = ((q.shape[2] + 1) // 2, q.shape[2] // 2)
        chunks = range(2 * ranks)
        if segment_ids is None:
            sees = [[c <= r and lengths[c % 2] > 0 and lengths[r % 2] > 0 for c in chunks] for r in chunks]
        else:
            ranges = torch.stack([_id_range(part) for part in segment_ids.split(lengths[0], 1)])
            if lengths[1] == 0:
                ranges = torch.cat([ranges, _id_range(segment_ids[:, :0])[None]])
            gathered = [torch.empty_like(ranges) for _ in range(ranks)]
            dist.all_gather(gathered, ranges, group=self.group)
            low, high = torch.cat(gathered).cpu().unbind(-1)  # [2 P, B]
            meet = ((low[:, None] <= high[None]) & (high[:, None] >= low[None])).any(-1).tolist()
            sees = [[c <= r and meet[r][c] for c in chunks] for r in chunks]
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
        return _Plan(rank, ranks, lengths, rows, sees)

    def _fetch_rows(
        self, plan: _Plan, operands: Operands, segment_ids: Tensor | None, others: list[Tensor]
    ) -> list[_Rows]:
        """The chunks whose rows this rank computes, its own or another's, with `others`, [B, H, T]."""
        sources = [operands.student_q, operands.teacher_q, *others]
        sources += [] if segment_ids is None else [segment_ids.long()]
        parts = {c: [_cut(x, plan.span(c)) for x in sources] for c in (2 * plan.rank, 2 * plan.rank + 1)}
        moves = [(c, c // 2, w) for w, chunks in enumerate(plan.rows) for c in chunks]
        shapes = {c: [_like(x, plan.span(c)) for x in sources] for c in plan.rows[plan.rank]}
        fetched = self._exchange(plan, moves, parts, shapes)
        found = []
        for chunk in plan.rows[plan.rank]:
            q_s, q_t, *rest = fetched[chunk]
            ids = rest.pop() if segment_ids is not None else None
            found.append(_Rows(q_s, q_t, ids, rest))
        return found

    def _return_rows(self, plan: _Plan, results: list[Tensor], shape: Sequence[int]) -> Tensor:
        """Each chunk's result back to its owner, and there side by side along the tokens."""
        parts = {c: [x.contiguous()] for c, x in zip(plan.rows[plan.rank], results, strict=True)}
        moves = [(c, w, c // 2) for w, chunks in enumerate(plan.rows) for c in chunks]
        whole = results[0].new_empty(shape)
        own = (2 * plan.rank, 2 * plan.rank + 1)
        fetched = self._exchange(plan, moves, parts, {c: [_like(whole, plan.span(c))] for c in own})
        return torch.cat([fetched[c][0] for c in own], 2)

    def _exchange(
        self,
        plan: _Plan,
        moves: list[tuple[int, int, int]],
        parts: dict[int, list[Tensor]],
        shapes: dict[int, list[Tensor]],
    ) -> dict[int, list[Tensor]]:
        """Carry out (chunk, from, to) moves, in the same order on every rank; what stays is not copied."""
        found, operations = {}, []
        for chunk, source, target in moves:
            if plan.rank == target:
                found[chunk] = parts[chunk] if source == target else [torch.empty_like(x) for x in shapes[chunk]]
                if source != target:
                    operations += [self._receive(x, source) for x in found[chunk]]
            elif plan.rank == source:
                operations += [self._send(x, target) for x in parts[chunk]]
        _wait(_start(operations))
        return found

    def _fetch_keys(
        self, plan: _Plan, operands: Operands, segment_ids: Tensor | None
    ) -> Iterator[tuple[int, dict[int, list[Tensor]]]]:
        """For each step (owner, {chunk: [k_s, k_t, ids]}), the next step's keys on their way meanwhile.

        Whoever takes a step's keys clears them when done: nothing else holds them.
        """
        sources = [operands.student_k, operands.teacher_k]
        sources += [] if segment_ids is None else [segment_ids.long()]

        def begin(step: int) -> tuple[int, dict[int, list[Tensor]], list[Any]]:
            owner, worker = (plan.rank - step) % plan.ranks, (plan.rank + step) % plan.ranks
            wanted = plan.keys(plan.rank, owner)
            if step == 0:
                return owner, {c: [_cut(x, plan.span(c)) for x in sources] for c in wanted}, []
            buffers = {c: [torch.empty_like(_like(x, plan.span(c))) for x in sources] for c in wanted}
            operations = [self._receive(x, owner) for c in wanted for x in buffers[c]]
            for chunk in plan.keys(worker, plan.rank):
                operations += [self._send(_cut(x, plan.span(chunk)), worker) for x in sources]
            return owner, buffers, _start(operations)

        owner, keys, works = begin(0)
        for step in range(plan.ranks):
            _wait(works)
            following = begin(step + 1) if step + 1 < plan.ranks else None
            yield owner, keys
            if following is not None:
                owner, keys, works = following
                del following

    def _send(self, x: Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(dist.isend, x, group=self.group, group_peer=peer)

    def _receive(self, x: Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(dist.irecv, x, group=self.group, group_peer=peer)


def _visits(plan: _Plan, rows: list[_Rows], keys: dict[int, list[Tensor]]) -> Iterator[tuple[int, int, Visit]]:
    """(index into rows, chunk of keys, visit) for all that one step's keys are for."""
    for chunk, (k_s, k_t, *ids) in keys.items():
        for i, (number, mine) in enumerate(zip(plan.rows[plan.rank], rows, strict=True)):
            if plan.sees[number][chunk]:
                yield i, chunk, Visit(mine.q_s, mine.q_t, k_s, k_t, mine.ids, ids[0] if ids else None, number == chunk)


class _Returns:
    """Gradients of fetched keys on their way back to their owners, and this rank's own coming in, a step behind."""

    def __init__(self, parallel: SequenceParallel, plan: _Plan, k_grad: Tensor) -> None:
        self.parallel, self.plan, self.k_grad = parallel, plan, k_grad
        self.pending: tuple[list[Any], dict[int, Tensor], Any] = ([], {}, None)

    def send(self, owner: int, found: dict[int, Tensor]) -> None:
        """Send back a step's gradients, and take in those that this rank's keys got in that step elsewhere."""
        self.finish()
        plan, rank = self.plan, self.plan.rank
        if owner == rank:
            self.pending = [], found, None
            return
        worker = (rank + (rank - owner)) % plan.ranks
        incoming = {c: self.k_grad.new_empty(_like(self.k_grad, plan.span(c)).shape) for c in plan.keys(worker, rank)}
        operations = [self.parallel._send(x, owner) for x in found.values()]
        operations += [self.parallel._receive(x, worker) for x in incoming.values()]
        self.pending = _start(operations), incoming, found

    def finish(self) -> None:
        """Wait for the last step's, and add them up."""
        works, incoming, _ = self.pending
        _wait(works)
        for chunk, grad in incoming.items():
            self.k_grad[:, :, self.plan.span(chunk)] += grad
        self.pending = [], {}, None


def _id_range(ids: Tensor) -> Tensor:
    """[B, 2]: the least and the largest id that is not negative; the least above the largest where there is none."""
    if ids.shape[1] == 0:
        return torch.tensor([2**62, -1], device=ids.device).expand(ids.shape[0], 2).contiguous()
    ids = ids.long()
    return torch.stack([torch.where(ids >= 0, ids, 2**62).amin(1), ids.amax(1).clamp(min=-1)], -1)


def _working(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _cut(x: Tensor, span: slice) -> Tensor:
    """A chunk of [B, H, T, ...] or, of ids, [B, T]."""
    return (x[:, span] if x.dim() == 2 else x[:, :, span]).contiguous()


def _like(x: Tensor, span: slice) -> Tensor:
    """Its shape, type and device, without its memory."""
    shape = list(x.shape)
    shape[1 if x.dim() == 2 else 2] = span.stop - span.start
    return x.new_empty(1).expand(shape)


def _start(operations: list[dist.P2POp]) -> list[Any]:
    operations = [operation for operation in operations if operation.tensor.numel() > 0]
    return dist.batch_isend_irecv(operations) if operations else []


def _wait(works: list[Any]) -> None:
    for work in works:
        work.wait()
    works.clear()  # they hold the tensors
