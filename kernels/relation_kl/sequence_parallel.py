"""The sequence-parallel form: contiguous shards of one long sequence, keys fetched from their owners chunk by chunk.

A shard is cut into two chunks, and rows are computed by chunks: every rank works on one chunk with few keys and one
with many, so that all work alike (with one segment: chunks w and 2 P - 1 - w, as in zigzag sharding). A rank begins
with its own keys. After that it visits those of the rank before it, of the one before that, and so on, a chunk at a
time, the next chunk on its way meanwhile; chunks that none of its rows can see are neither sent nor computed.
Statistics stay with the rows. In backward the gradient of fetched keys goes back to their owner in float32, a chunk
behind, where it is added up in the order of the steps.

Where visits are long, this is done for a few heads at a time (`head_groups`), and a rank holds the buffers of two such
groups in the place of those of all heads. Two groups take turns (`take_turns`): what one waits for passes while the
other's visits are computed. To issue whole groups one after the other would not do: exchanges are executed in the order
in which they are issued, so that a group's first would come after its predecessor's last, and but for its own keys it
would run alone. So the host goes from one to the other wherever one would wait. The first group is half of a pass
ahead, so that the two do not begin and end together, when much is exchanged and little computed.

Of each group a rank holds two chunks of its own, the rows that it computes, two chunks of keys and, in backward,
gradients of eight chunks at most: memory O(T), T the local length, whatever P is; and no more than two groups of heads
at once.

Every rank starts its exchanges in the same order. Of a group: rows, keys of the first two steps; then for each step [at
the last: gradients of rows,] gradients of its keys, and keys of the step after the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .chunk_plan import Plan, make_plan
from .head_group import Chunk, Job, Rows, by_heads, cut, empty_gradients, of_heads, pivots_of
from .torch_backend import Operands
from .torch_visit import State, exactly, working

# With fewer, transfers take longer than the computation; with more, they slow it down (figures in README.md).
_NCCL_BLOCKS = 8


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
        q = operands.student_q
        values = torch.empty(q.shape[:3], dtype=working(q), device=q.device)
        computed = (*q.shape[:2], sum(plan.row_lengths))
        statistics = tuple(torch.empty(computed, dtype=working(q), device=q.device) for _ in range(4))

        def work(part: Operands, heads: slice, key_heads: slice, ids: Tensor | None) -> Iterator[None]:
            job = self._start(plan, part, ids, pivots_of(part, softmax_scale, ids))
            of_rows = yield from self._forward(job, part, softmax_scale, values[:, heads])
            for x, *found in zip(statistics, *of_rows.values(), strict=True):
                torch.cat(found, 2, out=x[:, heads])

        by_heads(plan, operands, segment_ids, work)
        return values, statistics

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
        prepared, unit = self._prepare(operands, softmax_scale, segment_ids, row_grad)
        grads = empty_gradients(operands)

        def work(part: Operands, heads: slice, key_heads: slice, ids: Tensor | None) -> Iterator[None]:
            job = self._start(plan, part, ids, [prepared[:, heads]])
            parts = ([y.contiguous() for y in x[:, heads].split(plan.row_lengths, 2)] for x in statistics)
            of_rows = dict(zip(plan.rows[plan.rank], zip(*parts, strict=True), strict=True))
            yield from self._backward(job, part, softmax_scale, of_rows, unit, of_heads(grads, heads, key_heads))

        by_heads(plan, operands, segment_ids, work)
        return grads

    @exactly
    def value_and_grad(
        self, operands: Operands, softmax_scale: float, segment_ids: Tensor | None, row_grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rows and both gradients, by the two passes of each group of heads; rows of other ranks are fetched once."""
        plan = make_plan(operands.student_q, segment_ids, self.group)
        if plan is None:
            return self.local.value_and_grad(operands, softmax_scale, segment_ids, row_grad)
        q = operands.student_q
        prepared, unit = self._prepare(operands, softmax_scale, segment_ids, row_grad)
        values, grads = torch.empty(q.shape[:3], dtype=working(q), device=q.device), empty_gradients(operands)

        def work(part: Operands, heads: slice, key_heads: slice, ids: Tensor | None) -> Iterator[None]:
            job = self._start(plan, part, ids, [*pivots_of(part, softmax_scale, ids), prepared[:, heads]])
            of_rows = yield from self._forward(job, part, softmax_scale, values[:, heads])
            job.own, job.foreign = ([x._replace(others=x.others[2:]) for x in rows] for rows in (job.own, job.foreign))
            yield from self._backward(job, part, softmax_scale, of_rows, unit, of_heads(grads, heads, key_heads))

        by_heads(plan, operands, segment_ids, work)
        return values, *grads

    def _forward(
        self, job: Job, operands: Operands, scale: float, values: Tensor
    ) -> Generator[None, None, dict[int, tuple[Tensor, ...]]]:
        """Writes the values of this rank's rows; gives the statistics of the chunks that it computes, in order."""
        plan = job.plan
        states: dict[int, State] = {}

        def visit_all(keys: Chunk, chunk: int, rows: Sequence[Rows]) -> None:
            for each, visit in job.visits(keys, chunk, rows):
                states[each.chunk].add(self.visits.forward(visit, scale, (each.others[0], each.others[1])))

        stream = self._keys(job)
        next(stream)
        for rows in (job.own, job.foreign):
            if rows is job.foreign:
                yield
                _wait(job.works)
            states |= {each.chunk: State.start(each.others[0], each.others[1]) for each in rows}
            for chunk in plan.own:
                visit_all(job.keys[chunk], chunk, rows)
        yield
        for arrived in stream:
            if arrived is None:
                yield
                continue
            _, chunk, keys = arrived
            if keys is not None:
                visit_all(keys, chunk, [*job.foreign, *job.own])
                keys.clear()
        results = {each.chunk: states[each.chunk].rows(each.ids) for each in job.rows}
        shapes = {chunk: tuple(values[:, :, plan.span(chunk)].shape) for chunk in plan.own}
        found, works = self._start_return(plan, results, shapes)
        yield
        _wait(works)
        for chunk in plan.own:
            values[:, :, plan.span(chunk)] = found[chunk]
        return {each.chunk: states[each.chunk].statistics() for each in job.rows}

    def _backward(
        self,
        job: Job,
        operands: Operands,
        scale: float,
        of_rows: dict[int, tuple[Tensor, ...]],
        unit: Tensor | None,
        grads: tuple[Tensor, Tensor | None],
    ) -> Iterator[None]:
        """Writes the gradients of this rank's queries and keys; `of_rows` are the statistics."""
        plan, q = job.plan, operands.student_q

        def nothing_yet(x: Tensor) -> Tensor:
            return torch.zeros(self.visits.gradient_shape(x), dtype=working(x), device=x.device)

        k_grads = {chunk: nothing_yet(job.keys[chunk][0]) for chunk in plan.own}
        q_grads: dict[int, Tensor] = {}

        def visit_all(keys: Chunk, chunk: int, rows: Sequence[Rows], k_grad: Tensor) -> None:
            for each, visit in job.visits(keys, chunk, rows):
                q_grad = q_grads[each.chunk]
                self.visits.backward(visit, scale, of_rows[each.chunk], each.others[0], q_grad, k_grad)

        stream = self._keys(job)
        next(stream)
        for rows in (job.own, job.foreign):
            if rows is job.foreign:
                yield
                _wait(job.works)
            # Of a self-relation the sum is wanted.
            both = k_grads if operands.self_relation else {}
            q_grads |= {x.chunk: both[x.chunk] if x.chunk in both else nothing_yet(x.q_s) for x in rows}
            for chunk in plan.own:
                visit_all(job.keys[chunk], chunk, rows, k_grads[chunk])
        returns = _Returns(self, plan, k_grads)
        returned: tuple[dict[int, Tensor], list[Any]] = {}, []
        yield
        for arrived in stream:
            if arrived is None:
                yield
                continue
            step, chunk, keys = arrived
            if step == plan.steps[-1]:
                job.keys.clear()  # all are sent
            found = None if keys is None else nothing_yet(keys[0])
            if keys is not None and found is not None:
                visit_all(keys, chunk, job.foreign, found)
            if step == plan.steps[-1]:
                # The foreign rows are done; this rank's own visit is still to come.
                job.foreign.clear()
                shapes = {chunk: self.visits.gradient_shape(q[:, :, plan.span(chunk)]) for chunk in plan.own}
                returned = self._start_return(plan, q_grads, shapes)
            if keys is not None and found is not None:
                visit_all(keys, chunk, job.own, found)
                keys.clear()
            returns.send(step, found)
        of_queries, works = returned
        yield
        returns.finish()
        _wait(works)
        grad, of_keys = grads
        for chunk in plan.own:
            span, q_grad, k_grad = plan.span(chunk), of_queries[chunk], k_grads[chunk]
            if of_keys is not None:
                self.visits.finish(k_grad, unit, of_keys[:, :, span])
            elif q_grad is not k_grad:
                q_grad += k_grad
            self.visits.finish(q_grad, unit, grad[:, :, span])

    def _prepare(
        self, operands: Operands, scale: float, segment_ids: Tensor | None, row_grad: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The upstream gradient as visits take it, 0 for padding, which may be anything; see `torch_visit.prepare`."""
        row_grad = row_grad.to(working(operands.student_q))
        if segment_ids is not None:
            row_grad = torch.where((segment_ids >= 0)[:, None], row_grad, 0.0)
        return self.visits.prepare(row_grad, operands.student_q.dtype, scale, self.group)

    def _start(self, plan: Plan, operands: Operands, segment_ids: Tensor | None, others: list[Tensor]) -> Job:
        """Cuts the shard into chunks, and sends for the rows of other ranks; `others` are [B, H, T]."""
        ids = [] if segment_ids is None else [segment_ids]
        keys, rows = {}, {}
        for chunk in plan.own:
            span = plan.span(chunk)
            keys[chunk] = [cut(x, span) for x in (operands.student_k, operands.teacher_k, *ids)]
            queries = (
                keys[chunk][:2]
                if operands.self_relation
                else [cut(x, span) for x in (operands.student_q, operands.teacher_q)]
            )
            rows[chunk] = [*queries, *(cut(x, span) for x in (*others, *ids))]

        def named(chunk: int, tensors: list[Tensor]) -> Rows:
            return Rows(chunk, tensors[0], tensors[1], tensors[-1] if ids else None, tensors[2 : 2 + len(others)])

        # A chunk's shape is that of this rank's first or second one.
        shapes = {chunk: rows[plan.own[chunk % 2]] for chunk in plan.rows[plan.rank]}
        moves = [(chunk, chunk // 2, worker) for worker, chunks in enumerate(plan.rows) for chunk in chunks]
        found, works = self._exchange(plan, moves, rows, shapes)
        own = [named(chunk, x) for chunk, x in found.items() if chunk in plan.own]
        foreign = [named(chunk, x) for chunk, x in found.items() if chunk not in plan.own]
        return Job(plan, keys, own, foreign, works)

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

    def _keys(self, job: Job) -> Iterator[tuple[tuple[int, int], int, Chunk | None] | None]:
        """For each step None, when its keys are to be waited for, then (step, chunk, keys, if needed).

        Two steps' keys are on their way when the first None comes; those of a later step are sent for when a step's
        are done with. Whoever takes a step's keys clears them then: nothing else holds them.
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
        coming = deque(begin(step) for step in steps[:2])
        for i, step in enumerate(steps):
            yield None
            chunk, keys, works = coming.popleft()
            _wait(works)
            yield step, chunk, keys
            if i + 2 < len(steps):
                coming.append(begin(steps[i + 2]))

    def _send(self, x: Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(dist.isend, x, group=self.group, group_peer=peer)

    def _receive(self, x: Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(dist.irecv, x, group=self.group, group_peer=peer)


class _Returns:
    """Gradients of fetched keys on their way back to their owners, and this rank's own coming in, a step behind."""

    def __init__(self, parallel: SequenceParallel, plan: Plan, k_grads: dict[int, Tensor]) -> None:
        self.parallel, self.plan, self.k_grads = parallel, plan, k_grads
        self.pending: tuple[list[Any], Tensor | None, int] = ([], None, 0)

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
        self.pending = _start(operations), incoming, chunk

    def finish(self) -> None:
        """Wait for the last step's, and add it up."""
        works, incoming, chunk = self.pending
        _wait(works)
        if incoming is not None:
            self.k_grads[chunk] += incoming
        self.pending = [], None, 0


def _start(operations: list[dist.P2POp]) -> list[Any]:
    """Works, each with all of the operations, which hold the tensors until `_wait`, whether or not the works do."""
    operations = [operation for operation in operations if operation.tensor.numel() > 0]
    return [(work, operations) for work in dist.batch_isend_irecv(operations)] if operations else []


def _wait(works: list[Any]) -> None:
    for work, _ in works:
        work.wait()
    works.clear()
