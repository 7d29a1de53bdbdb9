"""The sequence-parallel form by messages: shards of one long sequence, computed by chunks, whose keys go round.

A shard is cut into two chunks, and every rank computes one chunk with few keys and one with many, so that all work
alike (with one segment: chunks w and 2 P - 1 - w, as in zigzag sharding). A chunk's rows and keys go to who computes it
first of all, where they stay, with its statistics. In forward a rank begins with the chunk that is of its own shard, if
one is, while the other one comes in; then come its two chunks with each other, and after these the keys of the rank
before it, of the one before that, and so on, the next rank's on their way meanwhile. With one segment, each rank has
as much to do with the keys of any other: two visits. Chunks that none of its rows can see are neither sent nor visited.

Backward goes the other way round. It begins with the keys that came last, which, where forward and backward are one
call, are still there, and ends with the rank's own chunk: what it has computed for others goes back meanwhile, in
float32. There it is added up in the order of the steps. Visits of a chunk to itself are kept for where there is nothing
else to do: for the beginning, when the other chunk or the first keys are on their way, and for the end.

Where visits are long, this is done for a few heads at a time (`head_groups`), and a rank holds the buffers of two such
groups in the place of those of all heads. Two groups take turns (`take_turns`), on two streams: what one waits for
passes while the other's visits are computed. To issue whole groups one after the other would not do: exchanges are
executed in the order in which they are issued, so that a group's first would come after its predecessor's last, and but
for its own keys it would run alone. A group gives way where it is to wait for rows of others, and at its end, where all
ranks have computed about as much; in between it does not, for who comes first to an exchange waits, and holds
multiprocessors meanwhile.

A rank's own chunks are visited where they lie in the caller's tensors. Only what is sent is copied, student and teacher
into one message, and kept until it was sent to all who need it. Of each group a rank holds the chunks of others that it
computes, four chunks of keys at most, a copy of its own on their way to others and, in backward, gradients of eight
chunks at most: memory O(T), T the local length, whatever P is; and no more than two groups of heads at once.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import exchanges
from .chunk_plan import Plan, make_plan
from .exchanges import AT_ONCE, Exchanges, Returns, Vectors, wait
from .head_group import Heads, Job, Rows, by_heads, empty_gradients, halves, of_heads, upstream_of
from .torch_backend import Operands
from .torch_visit import State, exactly, working

# With fewer, transfers take longer than the computation; with more, they slow it down, and NCCL's buffers take more
# memory (figures in TRIED.md). Of a group's blocks NCCL gives a message to one of P ranks a P-th.
_NCCL_BLOCKS_A_RANK, _MOST_NCCL_BLOCKS = 4, 16


def nccl_options(ranks: int) -> Any:
    """Options of an NCCL group of so many ranks whose exchanges run beside the kernels.

    `dist.new_group(members, backend="nccl", pg_options=nccl_options(len(members)))`: a kernel of NCCL's occupies
    multiprocessors until its peer has come, so it is to have few of them, and, as the kernels here fill them all, the
    first that are free.
    """
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options.config.max_ctas = min(_NCCL_BLOCKS_A_RANK * ranks, _MOST_NCCL_BLOCKS)
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
        plan = make_plan(operands, segment_ids, self.group)
        if plan is None:
            return self.local.forward(operands, softmax_scale, segment_ids)
        q = operands.student_q
        values = torch.empty(q.shape[:3], dtype=working(q), device=q.device)
        computed = (2, *q.shape[:2], sum(plan.row_lengths))
        statistics = tuple(torch.empty(computed, dtype=working(q), device=q.device) for _ in range(2))

        def work(part: Operands, heads: slice, key_heads: slice, ids: Tensor | None) -> Iterator[None]:
            job = self._start(plan, part, ids, torch.stack(self._pivots(part, softmax_scale, ids)))
            yield
            of_rows = yield from self._forward(job, softmax_scale, keep=False)
            for x, *found in zip(statistics, *(of_rows[each.chunk] for each in job.rows), strict=True):
                torch.cat(found, 3, out=x[:, :, heads])
            coming = {c: [exchanges.room(values[:, heads, plan.span(c)])] for c in plan.own if c not in job.results}
            wait(job.exchanges.results(job.results, coming))
            for chunk in plan.own:
                values[:, heads, plan.span(chunk)] = (job.results | coming)[chunk][0]

        by_heads(plan, operands, segment_ids, work, forward=True)
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
        plan = make_plan(operands, segment_ids, self.group)
        if plan is None:
            return self.local.backward(operands, softmax_scale, segment_ids, statistics, row_grad)
        prepared, unit = upstream_of(operands, softmax_scale, segment_ids, row_grad, self.visits, self.group)
        grads = empty_gradients(operands)

        def work(part: Operands, heads: slice, key_heads: slice, ids: Tensor | None) -> Iterator[None]:
            job = self._start(plan, part, ids, prepared[None, :, heads])
            yield
            parts = ([y.contiguous() for y in x[:, :, heads].split(plan.row_lengths, 3)] for x in statistics)
            of_rows = dict(zip(plan.rows[plan.rank], zip(*parts, strict=True), strict=True))
            yield from self._backward(job, part, softmax_scale, of_rows, unit, of_heads(grads, heads, key_heads))

        by_heads(plan, operands, segment_ids, work)
        return grads

    @exactly
    def value_and_grad(
        self, operands: Operands, softmax_scale: float, segment_ids: Tensor | None, row_grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rows and both gradients, by the two passes of each group of heads, for which rows come in once."""
        plan = make_plan(operands, segment_ids, self.group)
        if plan is None:
            return self.local.value_and_grad(operands, softmax_scale, segment_ids, row_grad)
        q = operands.student_q
        prepared, unit = upstream_of(operands, softmax_scale, segment_ids, row_grad, self.visits, self.group)
        values, grads = torch.empty(q.shape[:3], dtype=working(q), device=q.device), empty_gradients(operands)

        def work(part: Operands, heads: slice, key_heads: slice, ids: Tensor | None) -> Iterator[None]:
            job = self._start(
                plan, part, ids, torch.stack([*self._pivots(part, softmax_scale, ids), prepared[:, heads]])
            )
            yield
            of_rows = yield from self._forward(job, softmax_scale, keep=True)
            job.own, job.foreign = ([x._replace(numbers=x.numbers[2:]) for x in y] for y in (job.own, job.foreign))
            of_part = of_heads(grads, heads, key_heads)
            yield from self._backward(job, part, softmax_scale, of_rows, unit, of_part, values[:, heads])

        by_heads(plan, operands, segment_ids, work)
        return values, *grads

    def _forward(self, job: Job, scale: float, keep: bool) -> Generator[None, None, dict[int, tuple[Tensor, ...]]]:
        """Statistics of the chunks that this rank computes; their values are in job.results then.

        With `keep` the last keys are in job.held afterwards.
        """
        steps = job.plan.steps
        states = {each.chunk: State.start(each.numbers[:2]) for each in job.own}

        def visit_all(keys: Vectors, chunk: int, rows: Sequence[Rows]) -> None:
            for each, visit in job.visits(keys, chunk, rows):
                self.visits.forward(visit, scale, states[each.chunk])

        for each in job.own:
            visit_all(each.keys, each.chunk, job.own)
        yield
        wait(job.works)
        stream = job.exchanges.keys(steps, job.keys, job.like, {})
        states |= {each.chunk: State.start(each.numbers[:2]) for each in job.foreign}
        for each in job.rows:
            visit_all(each.keys, each.chunk, job.foreign if each.chunk in job.plan.own else job.rows)
        for step, arrived in stream:
            if keep and step in steps[-AT_ONCE:]:
                job.held[step] = list(arrived)
            while arrived:
                chunk, keys = arrived.pop(0)
                visit_all(keys, chunk, job.rows)
                del keys
        statistics = {}
        for each in job.rows:
            values, statistics[each.chunk] = self.visits.conclude(states.pop(each.chunk), each.keys.ids)
            job.results[each.chunk] = [values]
        return statistics

    def _backward(
        self,
        job: Job,
        operands: Operands,
        scale: float,
        of_rows: dict[int, tuple[Tensor, ...]],
        unit: Tensor | None,
        grads: tuple[Tensor, Tensor | None],
        values: Tensor | None = None,
    ) -> Iterator[None]:
        """Writes the gradients of this rank's queries and keys.

        Args:
            job: what is to be done; after a forward pass its values are in job.results, and the rows are there.
            operands: of these heads.
            scale: softmax_scale.
            of_rows: statistics of the chunks that this rank computes.
            unit: from `prepare`.
            grads: what is written.
            values: [B, H, T], to be written, too; None without a forward pass.
        """
        plan, q, k = job.plan, operands.student_q, operands.student_k
        both = operands.self_relation  # then a chunk's rows and its keys have one gradient

        def nothing_yet(x: Tensor) -> Tensor:
            return torch.zeros(self.visits.gradient_shape(x), dtype=working(x), device=x.device)

        q_grads: dict[int, Tensor] = {}
        k_grads = q_grads if both else {}

        def begin(rows: Sequence[Rows]) -> None:
            for each in rows:
                q_grads[each.chunk] = nothing_yet(each.queries.student)
                if not both:
                    k_grads[each.chunk] = nothing_yet(each.keys.student)

        def visit_all(
            keys: Vectors, chunk: int, rows: Sequence[Rows], k_grad: Tensor, part: Heads | None = None
        ) -> None:
            for each, visit in job.visits(keys, chunk, rows):
                *statistics, upstream = (*of_rows[each.chunk], each.numbers[0])
                q_grad, of_keys = q_grads[each.chunk], k_grad
                if part is not None:
                    heads, key_heads = part
                    visit = visit.of_heads(heads, key_heads)
                    *statistics, upstream = (x[..., heads, :].contiguous() for x in (*statistics, upstream))
                    q_grad, of_keys = q_grad[:, heads], of_keys[:, key_heads]
                self.visits.backward(visit, scale, statistics, upstream, q_grad, of_keys)

        def visit_own(parts: Sequence[Heads | None]) -> None:
            for part in parts:
                for each in job.own:
                    visit_all(each.keys, each.chunk, job.own, k_grads[each.chunk], part)

        begin(job.own)
        # Own rows and keys come last; but where rows are yet to come, half of the heads hide that.
        last: Sequence[Heads | None] = [None]
        if values is None:
            first, last = halves(q.shape[1], k.shape[1])
            visit_own(first)
            yield
            wait(job.works)
        # No sooner: the wait lets go of copies of the rows that were sent.
        begin(job.foreign)
        stream = job.exchanges.keys(plan.steps[::-1], job.keys, job.like, job.held)
        for each in job.foreign:
            visit_all(each.keys, each.chunk, [each], k_grads[each.chunk])
        returns = Returns(job.exchanges, k_grads)
        for step, arrived in stream:
            found: dict[int, Tensor] = {}
            while arrived:
                chunk, keys = arrived.pop(0)
                found[chunk] = nothing_yet(keys.student)
                visit_all(keys, chunk, job.rows, found[chunk])
                del keys
            returns.send(step, found)
            del found
        for each in job.rows:
            others = job.foreign if each.chunk in plan.own else job.rows
            visit_all(each.keys, each.chunk, [x for x in others if x.chunk != each.chunk], k_grads[each.chunk])
        returns.finish()
        job.foreign.clear()
        results, works = self._send_results(job, operands, q_grads, {} if both else k_grads, values)
        visit_own(last)
        wait(works)
        for chunk in plan.own:
            span, (q_grad, *rest) = plan.span(chunk), results[chunk]
            if chunk in returns.kept:
                (q_grad if both else rest[0]).add_(returns.kept[chunk])
            self.visits.finish(q_grad, unit, grads[0][:, :, span])
            if grads[1] is not None:
                self.visits.finish(rest.pop(0), unit, grads[1][:, :, span])
            if values is not None:
                values[:, :, span] = rest[0]

    def _send_results(
        self,
        job: Job,
        operands: Operands,
        q_grads: dict[int, Tensor],
        k_grads: dict[int, Tensor],
        values: Tensor | None,
    ) -> tuple[dict[int, list[Tensor]], list[Any]]:
        """Gradients, of rows and then of keys, and values, on their way to their owners: those of this rank's chunks,
        once the works were waited for."""
        plan, every = job.plan, [q_grads, k_grads] if k_grads else [q_grads]
        for chunk in q_grads:
            job.results[chunk] = [*(grads[chunk] for grads in every), *job.results.get(chunk, [])]
        coming: dict[int, list[Tensor]] = {}
        like = next(iter(q_grads.values()))
        for chunk in (chunk for chunk in plan.own if chunk not in job.results):
            span = plan.span(chunk)
            parts = (x[:, :, span] for x in (operands.student_q, operands.student_k)[: len(every)])
            coming[chunk] = [exchanges.room(like, self.visits.gradient_shape(x)) for x in parts]
            coming[chunk] += [] if values is None else [exchanges.room(values[:, :, span])]
        return job.results | coming, job.exchanges.results(job.results, coming)

    def _pivots(self, operands: Operands, scale: float, ids: Tensor | None) -> list[Tensor]:
        q_s, k_s, q_t, k_t, _ = operands
        return [self.visits.own_logits(q, k, scale, ids) for q, k in ((q_s, k_s), (q_t, k_t))]

    def _start(self, plan: Plan, operands: Operands, segment_ids: Tensor | None, numbers: Tensor) -> Job:
        """The chunks that this rank computes, those of other shards on their way; numbers [n, B, H, T], see `Rows`."""
        shard = []
        for chunk in plan.own:
            span = plan.span(chunk)
            q_s, k_s, q_t, k_t = (x[:, :, span] for x in operands[:4])
            keys = Vectors(k_s, k_t, None if segment_ids is None else segment_ids[:, span].contiguous())
            queries = keys if operands.self_relation else Vectors(q_s, q_t)
            shard.append(Rows(chunk, queries, keys, numbers[..., span].contiguous()))
        mine = plan.rows[plan.rank]
        # A chunk's shape is that of this rank's first or second one.
        foreign = [shard[chunk % 2].room(chunk) for chunk in mine if chunk not in plan.own]
        going = {rows.chunk: rows.message() for rows in shard if rows.chunk not in mine}
        of_rank = Exchanges(plan, self.group)
        works = of_rank.rows(going, {rows.chunk: rows.message() for rows in foreign})
        own = [rows for rows in shard if rows.chunk in mine]
        return Job(of_rank, own, foreign, works, [rows.keys for rows in shard])
