"""The sequence-parallel form among GPUs that reach one another's memory (`peer_memory`).

Who computes what is as in `sequence_parallel`: each rank two chunks of rows, against keys of all ranks in turn. What a
group of heads needs lies in a frame, always in the same place: of each rank's chunks the keys, queries and upstream
gradients, and their results. Owners put rows there, and take results from there; in between (`_passes`) a rank works
with nothing else. It copies the keys of other ranks, one chunk ahead, and adds up their gradients in two places in
turn, from which those ranks copy them.

So all groups of heads, and all calls of a shape, do the very same between putting and taking, as long as the same
chunks see one another: it is captured in a CUDA graph the second time. Then the host issues some 20 operations a group,
where it is some 200 otherwise, and short visits do not wait for it.

Groups of heads take turns on two lanes: what one waits for passes while the other's visits are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import zip_longest
from types import ModuleType

import torch
from torch import Tensor

from . import torch_visit
from .chunk_plan import Plan, head_groups, make_plan
from .exchanges import Vectors
from .head_group import empty_gradients, second_stream, upstream_of
from .peer_frame import Frame, Shapes
from .peer_memory import LANES, Lane, Reach
from .torch_backend import Operands
from .torch_visit import State, exactly, working

_CAPTURED = 2  # from this call on
_MOST_FRAMES = 64


class PeerParallel:
    """A backend over the ranks of a group, with the methods of the backend modules.

    Args:
        reach: their memory; its ranks hold the shards in order.
        local: the backend module that computes where no segment reaches beyond its shard.
        visits: `torch_visit`, or the module that computes like it.
    """

    def __init__(self, reach: Reach, local: ModuleType, visits: ModuleType) -> None:
        self.reach, self.local, self.visits = reach, local, visits

    @exactly
    def forward(
        self, operands: Operands, softmax_scale: float, segment_ids: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Rows [B, H, T] of this rank's shard, and statistics of the rows that it computed."""
        plan = make_plan(operands, segment_ids, self.reach.group)
        if plan is None:
            return self.local.forward(operands, softmax_scale, segment_ids)
        q = operands.student_q
        values = torch.empty(q.shape[:3], dtype=working(q), device=q.device)
        computed = (2, *q.shape[:2], sum(plan.row_lengths))
        statistics = torch.empty(computed, dtype=working(q), device=q.device), values.new_empty(computed)
        self._compute(plan, operands, softmax_scale, segment_ids, values=values, statistics=statistics)
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
        plan = make_plan(operands, segment_ids, self.reach.group)
        if plan is None:
            return self.local.backward(operands, softmax_scale, segment_ids, statistics, row_grad)
        grads = empty_gradients(operands)
        self._compute(plan, operands, softmax_scale, segment_ids, row_grad=row_grad, statistics=statistics, grads=grads)
        return grads

    @exactly
    def value_and_grad(
        self, operands: Operands, softmax_scale: float, segment_ids: Tensor | None, row_grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rows and both gradients, by the two passes of each group of heads, for which rows come in once."""
        plan = make_plan(operands, segment_ids, self.reach.group)
        if plan is None:
            return self.local.value_and_grad(operands, softmax_scale, segment_ids, row_grad)
        q = operands.student_q
        values, grads = torch.empty(q.shape[:3], dtype=working(q), device=q.device), empty_gradients(operands)
        self._compute(plan, operands, softmax_scale, segment_ids, row_grad=row_grad, values=values, grads=grads)
        return values, *grads

    def _compute(
        self,
        plan: Plan,
        operands: Operands,
        scale: float,
        segment_ids: Tensor | None,
        *,
        row_grad: Tensor | None = None,
        values: Tensor | None = None,
        statistics: Sequence[Tensor] | None = None,
        grads: tuple[Tensor, Tensor | None] | None = None,
    ) -> None:
        """The passes whose results are to be written, `values` or `grads` or both; one pass takes the statistics from
        the other."""
        q, k, ids = operands.student_q, operands.student_k, None if segment_ids is None else segment_ids.long()
        upstream, unit = None, None
        if row_grad is not None:
            upstream, unit = upstream_of(operands, scale, ids, row_grad, self.visits, self.reach.group)
        groups = head_groups(q.shape[1], k.shape[1], q.shape[0], plan.lengths[0], captured=True)
        on_gpu = q.device.type == "cuda"
        here = torch.cuda.current_stream(q.device) if on_gpu else None
        streams = [here, second_stream(q.device) if on_gpu else None]
        if here is not None and streams[1] is not None:
            streams[1].wait_stream(here)
        for number, (heads, key_heads) in enumerate(groups):
            with torch.cuda.stream(streams[number % LANES]):
                shapes = Shapes(
                    q.shape[0], heads.stop - heads.start, key_heads.stop - key_heads.start, q.shape[3], q.dtype,
                    operands.self_relation, ids is not None,
                )  # fmt: skip
                lane = self.reach.lanes[number % LANES]
                frame = self._frame(plan, lane, shapes)
                lane.begin()
                self._put(frame, operands, heads, key_heads, ids, upstream)
                if values is None and statistics is not None:
                    self._move_statistics(frame, statistics, heads, back=True)
                self._run(frame, scale, values is not None, grads is not None)
                if grads is None and statistics is not None:
                    self._move_statistics(frame, statistics, heads, back=False)
                self._take(frame, heads, key_heads, unit, values, grads)
                lane.end()
        if here is not None and streams[1] is not None:
            here.wait_stream(streams[1])

    def _frame(self, plan: Plan, lane: Lane, shapes: Shapes) -> Frame:
        """For a group of heads; the same one wherever the same is to be done."""
        visible = tuple(map(tuple, plan.rows)), tuple(map(tuple, plan.sees))
        key = plan.lengths, visible, shapes, self.visits, torch.are_deterministic_algorithms_enabled()
        if key not in lane.kept:
            if len(lane.kept) == _MOST_FRAMES:  # documents may lie in many ways
                lane.forget()
            frame = Frame(plan, lane, shapes, self.visits)  # may empty what was kept
            lane.kept[key] = frame
        return lane.kept[key]

    def _put(
        self,
        frame: Frame,
        operands: Operands,
        heads: slice,
        key_heads: slice,
        ids: Tensor | None,
        upstream: Tensor | None,
    ) -> None:
        """This rank's rows where they are computed."""
        q_s, k_s, q_t, k_t, itself = operands
        plan, put = frame.plan, frame.lane.put
        for chunk in plan.own:
            span, worker = plan.span(chunk), plan.worker(chunk)
            put(worker, frame.at("keys", chunk, worker), *(x[:, key_heads, span] for x in (k_s, k_t)))
            if not itself:
                put(worker, frame.at("queries", chunk, worker), *(x[:, heads, span] for x in (q_s, q_t)))
            if ids is not None:
                put(worker, frame.at("ids", chunk, worker), ids[:, span])
            if upstream is not None:
                put(worker, frame.at("upstream", chunk, worker), upstream[:, heads, span])

    def _take(
        self,
        frame: Frame,
        heads: slice,
        key_heads: slice,
        unit: Tensor | None,
        values: Tensor | None,
        grads: tuple[Tensor, Tensor | None] | None,
    ) -> None:
        """Results of this rank's rows from where they were computed; then the frame may be used again."""
        plan, lane = frame.plan, frame.lane
        for chunk in plan.own:
            span, worker = plan.span(chunk), plan.worker(chunk)
            copy = lane.copy if worker != plan.rank else Tensor.copy_
            if values is not None:
                copy(values[:, heads, span], frame.at("values", chunk, worker))
            every = [] if grads is None else [("q_grad", grads[0], heads), ("k_grad", grads[1], key_heads)]
            for name, out, part in every:
                if out is not None:
                    gradient = frame.at(name, chunk, worker)
                    if worker != plan.rank:
                        there, gradient = gradient, frame.incoming(chunk, gradient)
                        lane.copy(gradient, there)
                    self.visits.finish(gradient, unit, out[:, part, span])
        lane.barrier()

    def _move_statistics(self, frame: Frame, statistics: Sequence[Tensor], heads: slice, back: bool) -> None:
        """Between the frame and [2, B, H, N] of all heads, in the order of the rows."""
        for name, whole in zip(("m", "total"), statistics, strict=True):
            parts = whole[:, :, heads].split(frame.plan.row_lengths, 3)
            for chunk, part in zip(frame.mine, parts, strict=True):
                x = frame.at(name, chunk)
                x.copy_(part) if back else part.copy_(x)

    def _run(self, frame: Frame, scale: float, forward: bool, backward: bool) -> None:
        """The passes, by a graph if they have been here before."""
        passes = partial(self._passes, frame, scale, forward, backward)
        # What torch computes is not captured: a graph would keep its buffers, of logits and cuBLAS's, for good.
        if self.reach.device.type != "cuda" or self.visits is torch_visit:
            passes()
            return
        key = scale, forward, backward, torch.backends.cuda.matmul.allow_tf32
        seen = frame.graphs.get(key, 0)
        if isinstance(seen, int):
            frame.graphs[key] = seen + 1
            if seen + 1 < _CAPTURED:
                passes()  # kernels are compiled here
                return
            frame.graphs[key] = frame.lane.capture(passes)
        frame.graphs[key].replay()

    def _passes(self, frame: Frame, scale: float, forward: bool, backward: bool) -> None:
        """From rows to results, both in the frame; nothing else is read or written."""
        lane = frame.lane
        lane.barrier()
        if forward:
            statistics = self._forward(frame, scale)
        else:
            statistics = {chunk: (frame.at("m", chunk), frame.at("total", chunk)) for chunk in frame.mine}
        if backward:
            self._backward(frame, scale, statistics)
        else:
            for chunk, found in statistics.items():
                for name, x in zip(("m", "total"), found, strict=True):
                    frame.at(name, chunk).copy_(x)
        with lane.beside():  # a graph knows no stream that did not begin behind its own, where nothing was exchanged
            mark = lane.mark()
        lane.wait(mark)
        lane.barrier()

    def _forward(self, frame: Frame, scale: float) -> dict[int, tuple[Tensor, Tensor]]:
        """Writes values; returns statistics of the chunks."""
        plan, states = frame.plan, {}
        stream = frame.fetch(plan.steps)
        for row in frame.mine:
            q, k = frame.queries(row), frame.keys(row)
            pairs = ((q.student, k.student), (q.teacher, k.teacher))
            states[row] = State.start(torch.stack([self.visits.own_logits(x, y, scale, k.ids) for x, y in pairs]))

        def visit_all(chunk: int, keys: Vectors) -> None:
            for row, visit in frame.visits_of(chunk, keys):
                self.visits.forward(visit, scale, states[row])

        for chunk in frame.mine:
            visit_all(chunk, frame.keys(chunk))
        for chunk, keys in stream:
            visit_all(chunk, keys)
        statistics = {}
        for row in frame.mine:
            values, statistics[row] = self.visits.conclude(states.pop(row), frame.keys(row).ids)
            frame.at("values", row).copy_(values)
        return statistics

    def _backward(self, frame: Frame, scale: float, statistics: dict[int, tuple[Tensor, Tensor]]) -> None:
        """Writes gradients."""
        plan, lane, rank = frame.plan, frame.lane, frame.rank
        steps = plan.steps[::-1]
        stream = frame.fetch(steps)
        q_grads = {row: frame.at("q_grad", row).zero_() for row in frame.mine}
        k_grads = q_grads
        if not frame.shapes.self_relation:
            k_grads = {chunk: frame.at("k_grad", chunk).zero_() for chunk in frame.mine}

        def visit_all(chunk: int, keys: Vectors, k_grad: Tensor) -> None:
            for row, visit in frame.visits_of(chunk, keys):
                upstream = frame.at("upstream", row)
                self.visits.backward(visit, scale, statistics[row], upstream, q_grads[row], k_grad)

        number, mark, incoming = 0, None, list[tuple[int, Tensor]]()

        def take_in() -> None:
            lane.wait(mark)
            for chunk, gradient in incoming:
                k_grads[chunk] += gradient

        for step in steps:
            source, worker = (rank - step) % plan.ranks, (rank + step) % plan.ranks
            before = plan.fetched_before(worker, step)
            exchanged = zip_longest(plan.fetched(rank, source), plan.fetched(worker, rank))
            for j, (theirs, mine) in enumerate(exchanged):
                if theirs is not None:
                    chunk, keys = next(stream)
                    visit_all(chunk, keys, frame.at("found", chunk, place=number % 2).zero_())
                    number += 1
                # When this is done, what was in the other place has been copied.
                take_in()
                incoming.clear()
                with lane.beside():
                    if theirs is not None:
                        lane.offer(source)
                    if mine is not None:
                        there = frame.at("found", mine, worker, (before + j) % 2)
                        incoming.append((mine, frame.incoming(mine, there)))
                        lane.take(worker, incoming[0][1], there)
                    if theirs is not None:
                        lane.until_taken(source)
                mark = lane.mark()
        for chunk in frame.mine:
            visit_all(chunk, frame.keys(chunk), k_grads[chunk])
        take_in()
