"""The sequence-parallel form: contiguous shards of one long sequence, keys fetched from their owners chunk by chunk.

A shard is cut into two chunks, and rows are computed by chunks: every rank works on one chunk with few keys and one
with many, so that all work alike (with one segment: chunks w and 2 P - 1 - w, as in zigzag sharding). A rank begins
with its own keys. After that it visits those of the rank before it, of the one before that, and so on, a chunk at a
time, the next chunk on its way meanwhile; chunks that none of its rows can see are neither sent nor computed.
Statistics stay with the rows. In backward the gradient of fetched keys goes back to their owner in float32, a chunk
behind, where it is added up in the order of the steps. A rank holds its own shard, the rows that it computes, two
chunks of keys and what is on its way out: memory O(T), T the local length, whatever P is.

Every rank starts its exchanges in the same order: rows, keys of the first step; then for each step keys of the next
one, [at the last: gradients of rows,] gradients of the step's keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .chunk_plan import Plan, make_plan
from .torch_backend import Operands
from .torch_visit import State, Visit, exactly, own_logits, working

# With fewer, transfers take longer than the computation; with more, they slow it down (figures in README.md).
_NCCL_BLOCKS = 8

Chunk = list[Tensor]  # of keys: k_s, k_t [B, Hkv, N, D], and ids [B, N] where there are segments


class _Rows(NamedTuple):
    """What a rank knows of a chunk whose rows it computes."""

    chunk: int
    q_s: Tensor  # [B, H, R, D]
    q_t: Tensor
    ids: Tensor | None  # [B, R]
    others: list[Tensor]  # [B, H, R]: the pivots of student and teacher in forward, upstream gradient in backward


@dataclass
class _Job:
    """A call on this rank: its own keys, cut into chunks once, and the rows that it computes.

    Attributes:
        plan: who computes what.
        keys: this rank's chunks.
        own: the rows of this rank's chunks that it computes itself.
        foreign: those of other ranks' chunks; not to be looked at before `wait`.
        works: what brings them.
    """

    plan: Plan
    keys: dict[int, Chunk]
    own: list[_Rows]
    foreign: list[_Rows]
    works: list[Any]

    @property
    def rows(self) -> list[_Rows]:
        """All rows that this rank computes, in the order of the plan, in which statistics are kept."""
        return sorted(self.own + self.foreign, key=lambda rows: rows.chunk)

    def visits(self, keys: Chunk, chunk: int, rows: Sequence[_Rows]) -> Iterator[tuple[_Rows, Visit]]:
        """The visits of the chunk by those rows that may see it."""
        k_s, k_t, *ids = keys
        for each in rows:
            if self.plan.sees[each.chunk][chunk]:
                of_keys = ids[0] if ids else None
                yield each, Visit(each.q_s, each.q_t, k_s, k_t, each.ids, of_keys, each.chunk == chunk)


def nccl_options() -> Any:
    """Options of an NCCL group whose exchanges run beside the kernels.

    `dist.new_group(ranks, backend="nccl", pg_options=nccl_options())`: a kernel of NCCL's occupies multiprocessors
    until its peer has come, so it is to have few of them, and, as the kernels here fill them all, the first that are
    free.
    """
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options.config.max_ctas = _NCCL_BLOCKS
    return options


class SequenceParallel:
    """A backend over the ranks of a group, with the methods of the backend modules.

    Args:
        group: torch process group; its ranks hold the shards in order.
        local: the backend module that computes where no segment reaches beyond its shard.
        visits: `torch_visit`, or the module that computes like it.
    """

    def __init__(self, group: Any, local: ModuleType, visits: ModuleType) -> None:
        self.group, self.local, self.visits = group, local, visits

    @exactly
    def forward(
        self, operands: Operands, softmax_scale: float, segment_ids: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Rows [B, H, T] of this rank's shard, and statistics of the rows that it computed."""
        plan = make_plan(operands.student_q, segment_ids, self.group)
        if plan is None:
            return self.local.forward(operands, softmax_scale, segment_ids)
        job = self._start(plan, operands, segment_ids, self._pivots(operands, softmax_scale, segment_ids))
        return self._forward(job, operands, softmax_scale)

    @exactly
    def backward(
        self,
        operands: Operands,
        softmax_scale: float,
        segment_ids: Tensor | None,
        statistics: Sequence[Tensor],
        row_grad: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of this rank's student_q and student_k for the sum over all ranks; see the backend modules."""
        plan = make_plan(operands.student_q, segment_ids, self.group)
        if plan is None:
            return self.local.backward(operands, softmax_scale, segment_ids, statistics, row_grad)
        row_grad, unit = self._prepare(operands, softmax_scale, segment_ids, row_grad)
        job = self._start(plan, operands, segment_ids, [row_grad])
        return self._backward(job, operands, softmax_scale, statistics, unit)

    @exactly
    def value_and_grad(
        self, operands: Operands, softmax_scale: float, segment_ids: Tensor | None, row_grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rows and both gradients, by the two passes; rows of other ranks are fetched once."""
        plan = make_plan(operands.student_q, segment_ids, self.group)
        if plan is None:
            return self.local.value_and_grad(operands, softmax_scale, segment_ids, row_grad)
        row_grad, unit = self._prepare(operands, softmax_scale, segment_ids, row_grad)
        pivots = self._pivots(operands, softmax_scale, segment_ids)
        job = self._start(plan, operands, segment_ids, [*pivots, row_grad])
        values, statistics = self._forward(job, operands, softmax_scale)
        job.own, job.foreign = ([x._replace(others=x.others[2:]) for x in rows] for rows in (job.own, job.foreign))
        return values, *self._backward(job, operands, softmax_scale, statistics, unit)

    def _forward(self, job: _Job, operands: Operands, scale: float) -> tuple[Tensor, tuple[Tensor, ...]]:
        plan = job.plan
        states: dict[int, State] = {}

        def visit_all(keys: Chunk, chunk: int, rows: Sequence[_Rows]) -> None:
            for each, visit in job.visits(keys, chunk, rows):
                states[each.chunk].add(self.visits.forward(visit, scale, (each.others[0], each.others[1])))

        stream = self._keys(job)
        next(stream)
        for rows in (job.own, job.foreign):
            if rows is job.foreign:
                _wait(job.works)
            states |= {each.chunk: State.start(each.others[0], each.others[1]) for each in rows}
            for chunk in plan.own:
                visit_all(job.keys[chunk], chunk, rows)
        for _, chunk, keys in stream:
            if keys is not None:
                visit_all(keys, chunk, [*job.foreign, *job.own])
                keys.clear()
        results = {each.chunk: states[each.chunk].rows(each.ids) for each in job.rows}
        spans = {chunk: plan.span(chunk) for chunk in plan.own}
        heads = operands.student_q.shape[:2]
        shapes = {chunk: (*heads, span.stop - span.start) for chunk, span in spans.items()}
        found, works = self._start_return(plan, results, shapes)
        _wait(works)
        values = torch.cat([found[chunk] for chunk in plan.own], 2)
        statistics = zip(*(states[each.chunk].statistics() for each in job.rows), strict=True)
        return values, tuple(torch.cat(each, 2) for each in statistics)

    def _backward(
        self, job: _Job, operands: Operands, scale: float, statistics: Sequence[Tensor], unit: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        plan, q, k = job.plan, operands.student_q, operands.student_k

        def nothing_yet(x: Tensor) -> Tensor:
            return torch.zeros(self.visits.gradient_shape(x), dtype=working(x), device=x.device)

        chunks = plan.rows[plan.rank]
        lengths = [plan.span(chunk).stop - plan.span(chunk).start for chunk in chunks]
        of_rows = dict(zip(chunks, zip(*(x.split(lengths, 2) for x in statistics), strict=True), strict=True))
        k_grads = {chunk: nothing_yet(job.keys[chunk][0]) for chunk in plan.own}
        q_grads: dict[int, Tensor] = {}

        def visit_all(keys: Chunk, chunk: int, rows: Sequence[_Rows], k_grad: Tensor) -> None:
            for each, visit in job.visits(keys, chunk, rows):
                q_grad = q_grads[each.chunk]
                self.visits.backward(visit, scale, of_rows[each.chunk], each.others[0], q_grad, k_grad)

        stream = self._keys(job)
        next(stream)
        for rows in (job.own, job.foreign):
            if rows is job.foreign:
                _wait(job.works)
            for each in rows:
                # Of a self-relation the sum is wanted.
                shared = operands.self_relation and each.chunk in k_grads
                q_grads[each.chunk] = k_grads[each.chunk] if shared else nothing_yet(each.q_s)
            for chunk in plan.own:
                visit_all(job.keys[chunk], chunk, rows, k_grads[chunk])
        returns = _Returns(self, plan, k_grads)
        returned: tuple[dict[int, Tensor], list[Any]] = {}, []
        for step, chunk, keys in stream:
            found = None if keys is None else nothing_yet(keys[0])
            if keys is not None and found is not None:
                visit_all(keys, chunk, job.foreign, found)
            if step == plan.steps[-1]:
                # The foreign rows are done; this rank's own visit is still to come.
                shapes = {chunk: self.visits.gradient_shape(q[:, :, plan.span(chunk)]) for chunk in plan.own}
                returned = self._start_return(plan, q_grads, shapes)
            if keys is not None and found is not None:
                visit_all(keys, chunk, job.own, found)
                keys.clear()
            returns.send(step, found)
        returns.finish()
        of_queries, works = returned
        _wait(works)
        grad = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        of_keys = None if operands.self_relation else torch.empty(k.shape, dtype=k.dtype, device=k.device)
        for chunk in plan.own:
            span, q_grad, k_grad = plan.span(chunk), of_queries[chunk], k_grads[chunk]
            if of_keys is not None:
                self.visits.finish(k_grad, unit, of_keys[:, :, span])
            elif q_grad is not k_grad:
                q_grad += k_grad
            self.visits.finish(q_grad, unit, grad[:, :, span])
        return grad, of_keys

    def _pivots(self, operands: Operands, scale: float, segment_ids: Tensor | None) -> list[Tensor]:
        q_s, k_s, q_t, k_t, _ = operands
        return [own_logits(q, k, scale, segment_ids) for q, k in ((q_s, k_s), (q_t, k_t))]

    def _prepare(
        self, operands: Operands, scale: float, segment_ids: Tensor | None, row_grad: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The upstream gradient as visits take it, 0 for padding, which may be anything; see `torch_visit.prepare`."""
        row_grad = row_grad.to(working(operands.student_q))
        if segment_ids is not None:
            row_grad = torch.where((segment_ids >= 0)[:, None], row_grad, 0.0)
        return self.visits.prepare(row_grad, operands.student_q.dtype, scale, self.group)

    def _start(self, plan: Plan, operands: Operands, segment_ids: Tensor | None, others: list[Tensor]) -> _Job:
        """Cuts the shard into chunks, and sends for the rows of other ranks; `others` are [B, H, T]."""
        ids = [] if segment_ids is None else [segment_ids.long()]
        keys, rows = {}, {}
        for chunk in plan.own:
            span = plan.span(chunk)
            keys[chunk] = [_cut(x, span) for x in (operands.student_k, operands.teacher_k, *ids)]
            queries = (
                keys[chunk][:2]
                if operands.self_relation
                else [_cut(x, span) for x in (operands.student_q, operands.teacher_q)]
            )
            rows[chunk] = [*queries, *(_cut(x, span) for x in (*others, *ids))]

        def named(chunk: int, tensors: list[Tensor]) -> _Rows:
            return _Rows(chunk, tensors[0], tensors[1], tensors[-1] if ids else None, tensors[2 : 2 + len(others)])

        # A chunk's shape is that of this rank's first or second one.
        shapes = {chunk: rows[plan.own[chunk % 2]] for chunk in plan.rows[plan.rank]}
        moves = [(chunk, chunk // 2, worker) for worker, chunks in enumerate(plan.rows) for chunk in chunks]
        found, works = self._exchange(plan, moves, rows, shapes)
        own = [named(chunk, x) for chunk, x in found.items() if chunk in plan.own]
        foreign = [named(chunk, x) for chunk, x in found.items() if chunk not in plan.own]
        return _Job(plan, keys, own, foreign, works)

    def _start_return(
        self, plan: Plan, results: dict[int, Tensor], shapes: dict[int, tuple[int, ...]]
    ) -> tuple[dict[int, Tensor], list[Any]]:
        """Sends the results of rows to their owners; own chunk -> its result, once the works are waited for.

        `shapes` are those of this rank's chunks' results.
        """
        parts = {chunk: [x] for chunk, x in results.items()}
        example = next(iter(results.values()))
        examples = {chunk: [example.new_empty(1).expand(shape)] for chunk, shape in shapes.items()}
        moves = [(chunk, worker, chunk // 2) for worker, chunks in enumerate(plan.rows) for chunk in chunks]
        found, works = self._exchange(plan, moves, parts, examples)
        return {chunk: tensors[0] for chunk, tensors in found.items()}, works

    def _exchange(
        self,
        plan: Plan,
        moves: list[tuple[int, int, int]],
        parts: dict[int, list[Tensor]],
        shapes: dict[int, list[Tensor]],
    ) -> tuple[dict[int, list[Tensor]], list[Any]]:
        """Start (chunk, from, to) moves, in the same order on every rank; what stays is not copied."""
        found, operations = {}, []
        for chunk, source, target in moves:
            if plan.rank == target:
                found[chunk] = parts[chunk] if source == target else [torch.empty_like(x) for x in shapes[chunk]]
                if source != target:
                    operations += [self._receive(x, source) for x in found[chunk]]
            elif plan.rank == source:
                operations += [self._send(x, target) for x in parts[chunk]]
        return found, _start(operations)

    def _keys(self, job: _Job) -> Iterator[tuple[tuple[int, int], int, Chunk | None]]:
        """First an empty step, by which the first keys are on their way; then (step, chunk, keys, if needed) for each.

        The next step's keys are on their way meanwhile. Whoever takes a step's keys clears them when done: nothing
        else holds them.
        """
        plan = job.plan

        def begin(step: tuple[int, int]) -> tuple[int, Chunk | None, list[Any]]:
            coming, going = plan.coming(step), plan.going(step)
            buffers, operations = None, []
            if coming is not None:
                shapes = job.keys[plan.own[step[1]]]
                buffers = [torch.empty_like(x) for x in shapes]
                operations += [self._receive(x, coming[0]) for x in buffers]
            if going is not None:
                operations += [self._send(x, going[0]) for x in job.keys[going[1]]]
            return -1 if coming is None else coming[1], buffers, _start(operations)

        steps = plan.steps
        following = begin(steps[0])
        yield (0, 0), -1, None
        for i, step in enumerate(steps):
            chunk, keys, works = following
            _wait(works)
            following = begin(steps[i + 1]) if i + 1 < len(steps) else (-1, None, [])
            yield step, chunk, keys

    def _send(self, x: Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(dist.isend, x, group=self.group, group_peer=peer)

    def _receive(self, x: Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(dist.irecv, x, group=self.group, group_peer=peer)


class _Returns:
    """Gradients of fetched keys on their way back to their owners, and this rank's own coming in, a step behind."""

    def __init__(self, parallel: SequenceParallel, plan: Plan, k_grads: dict[int, Tensor]) -> None:
        self.parallel, self.plan, self.k_grads = parallel, plan, k_grads
        self.pending: tuple[list[Any], Tensor | None, int, Tensor | None] = ([], None, 0, None)

    def send(self, step: tuple[int, int], found: Tensor | None) -> None:
        """Send back a step's gradient, and take in the one that this rank's keys got in that step elsewhere."""
        self.finish()
        coming, going = self.plan.coming(step), self.plan.going(step)
        operations, incoming, chunk = [], None, 0
        if coming is not None and found is not None:
            operations.append(self.parallel._send(found, coming[0]))
        if going is not None:
            worker, chunk = going
            incoming = torch.empty_like(self.k_grads[chunk])
            operations.append(self.parallel._receive(incoming, worker))
        self.pending = _start(operations), incoming, chunk, found

    def finish(self) -> None:
        """Wait for the last step's, and add it up."""
        works, incoming, chunk, _ = self.pending
        _wait(works)
        if incoming is not None:
            self.k_grads[chunk] += incoming
        self.pending = [], None, 0, None


def _cut(x: Tensor, span: slice) -> Tensor:
    """A chunk of [B, H, T, ...] or, of ids, [B, T]."""
    return (x[:, span] if x.dim() == 2 else x[:, :, span]).contiguous()


def _start(operations: list[dist.P2POp]) -> list[Any]:
    operations = [operation for operation in operations if operation.tensor.numel() > 0]
    return dist.batch_isend_irecv(operations) if operations else []


def _wait(works: list[Any]) -> None:
    for work in works:
        work.wait()
    works.clear()  # they hold the tensors
