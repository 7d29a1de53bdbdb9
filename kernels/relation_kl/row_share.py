"""One of several shares of a self-relation's rows, for processes that all hold the same whole sequences.

The tokens are cut into 2 C chunks of equal length. Share i of C has the rows of chunks i and 2 C - 1 - i, which see as
many keys as those of any other share: two chunks see themselves, in one visit, and 2 C - 1 pairs of chunks are rows and
keys before them, side by side in another one, so that few heads fill a GPU, too. Nothing is exchanged. What a share
does not compute is 0: rows and gradients of all shares add up to those of the whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .chunk_plan import id_range
from .torch_backend import Operands
from .torch_visit import State, Visit, exactly, working

_Pairs = list[tuple[int, int]]  # chunks of rows and of keys


class _Chunks(NamedTuple):
    """The operands by chunks."""

    x_s: Tensor  # [2 C, B, H, L, D]
    x_t: Tensor
    ids: Tensor | None  # int64 [2 C, B, L]


class RowShare:
    """A backend for a share of the rows, with the methods of the backend modules; for self-relations.

    Args:
        index: of the share, from 0.
        count: C, of all shares.
        visits: `torch_visit`, or the module that computes like it.
    """

    def __init__(self, index: int, count: int, visits: ModuleType) -> None:
        self.count, self.visits = count, visits
        self.own = index, 2 * count - 1 - index  # chunks

    @exactly
    def forward(
        self, operands: Operands, softmax_scale: float, segment_ids: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Rows [B, H, T], and statistics of those that were computed, [2 chunks, 2, B, H, L]."""
        chunks = self._chunks(operands, segment_ids)
        seen: dict[int, list[State]] = {chunk: [] for chunk in self.own}
        for pairs, visit in self._visits(chunks):
            pivots = [self.visits.own_logits(x, x, softmax_scale, visit.row_ids) for x in (visit.q_s, visit.q_t)]
            state = State.start(torch.stack(pivots))
            self.visits.forward(visit, softmax_scale, state)
            parts = [x.chunk(len(pairs), -3) for x in (state.m, state.total, state.a)]
            for (chunk, _), *part in zip(pairs, *parts, strict=True):
                seen[chunk].append(State(*part))
        states = {chunk: State.joined(found) for chunk, found in seen.items()}
        rows = torch.zeros(chunks.x_s.shape[:4], dtype=working(chunks.x_s), device=chunks.x_s.device)
        statistics = []
        for chunk, state in states.items():
            rows[chunk], found = self.visits.conclude(state, None if chunks.ids is None else chunks.ids[chunk])
            statistics.append(found)
        statistics = zip(*statistics, strict=True)
        return _whole(rows, operands), tuple(torch.stack(each) for each in statistics)

    @exactly
    def backward(
        self,
        operands: Operands,
        softmax_scale: float,
        segment_ids: Tensor | None,
        statistics: Sequence[Tensor],
        row_grad: Tensor,
    ) -> tuple[Tensor, None]:
        """What this share's rows add to the gradient of student_q, rows and keys; upstream of other rows is ignored."""
        chunks = self._chunks(operands, segment_ids)
        kind = working(chunks.x_s)
        upstream = self._cut(row_grad, 2)
        upstream = torch.stack([upstream[chunk] for chunk in self.own]).to(kind)
        if chunks.ids is not None:
            real = torch.stack([chunks.ids[chunk] for chunk in self.own]) >= 0
            upstream = torch.where(real[:, :, None], upstream, 0.0)
        upstream, unit = self.visits.prepare(upstream, chunks.x_s.dtype, softmax_scale, None)
        shape = self.visits.gradient_shape(chunks.x_s[0])
        total = torch.zeros(len(chunks.x_s), *shape, dtype=kind, device=chunks.x_s.device)
        for pairs, visit in self._visits(chunks):
            *of_rows, g = (torch.cat([x[self.own.index(row)] for row, _ in pairs], -3) for x in (*statistics, upstream))
            q_grad = torch.zeros(self.visits.gradient_shape(visit.q_s), dtype=kind, device=total.device)
            k_grad = q_grad if visit.diagonal else torch.zeros_like(q_grad)
            self.visits.backward(visit, softmax_scale, of_rows, g, q_grad, k_grad)
            for (row, key), x, y in zip(pairs, q_grad.chunk(len(pairs)), k_grad.chunk(len(pairs)), strict=True):
                total[row] += x
                if key != row:
                    total[key] += y
        grad = torch.empty(chunks.x_s.shape, dtype=chunks.x_s.dtype, device=total.device)
        self.visits.finish(total.flatten(0, 1), unit, grad.flatten(0, 1))
        return _whole(grad, operands), None

    def value_and_grad(
        self, operands: Operands, softmax_scale: float, segment_ids: Tensor | None, row_grad: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        """Rows and gradient, by the two passes."""
        rows, statistics = self.forward(operands, softmax_scale, segment_ids)
        return rows, *self.backward(operands, softmax_scale, segment_ids, statistics, row_grad)

    def _chunks(self, operands: Operands, segment_ids: Tensor | None) -> _Chunks:
        assert operands.self_relation
        x_s, x_t = (self._cut(x, 2) for x in (operands.student_q, operands.teacher_q))
        seq_len = operands.student_q.shape[2]
        if segment_ids is None and seq_len % (2 * self.count):
            segment_ids = torch.zeros(x_s.shape[1], seq_len, dtype=torch.int64, device=x_s.device)
        return _Chunks(x_s, x_t, None if segment_ids is None else self._cut(segment_ids.long(), 1, -1))

    def _cut(self, x: Tensor, dim: int, fill: int = 0) -> Tensor:
        """[2 C, ...]: the chunks of tokens, which are at `dim`; what is missing of the last ones is `fill`."""
        missing = -x.shape[dim] % (2 * self.count)
        if missing:
            x = torch.cat([x, x.new_full((*x.shape[:dim], missing, *x.shape[dim + 1 :]), fill)], dim)
        return x.unflatten(dim, (2 * self.count, -1)).movedim(dim, 0)

    def _visits(self, chunks: _Chunks) -> Iterator[tuple[_Pairs, Visit]]:
        """Of this share's chunks with themselves, then with those before them; pairs lie side by side in the batch."""
        x_s, x_t, ids = chunks
        itself = [(chunk, chunk) for chunk in self.own]
        before = [(row, key) for row in self.own for key in range(row) if ids is None or _meet(ids[row], ids[key])]
        for pairs in (itself, before) if before else (itself,):

            def side_by_side(which: int, pairs: _Pairs = pairs) -> tuple[Tensor, Tensor, Tensor | None]:
                students, teachers = (torch.cat([x[pair[which]] for pair in pairs]) for x in (x_s, x_t))
                return students, teachers, None if ids is None else torch.cat([ids[pair[which]] for pair in pairs])

            q_s, q_t, row_ids = rows = side_by_side(0)
            k_s, k_t, key_ids = rows if pairs is itself else side_by_side(1)
            yield pairs, Visit(q_s, q_t, k_s, k_t, row_ids, key_ids, pairs is itself)


def _meet(rows: Tensor, keys: Tensor) -> bool:
    """Whether rows [B, L] may see keys by the ranges of their ids; True where that would mean to wait for a device.

    There the kernels find it out, and skip the tiles.
    """
    if rows.device.type != "cpu":
        return True
    (low, high), (low_keys, high_keys) = (id_range(ids).unbind(-1) for ids in (rows, keys))
    return bool(((low <= high_keys) & (low_keys <= high)).any())


def _whole(x: Tensor, operands: Operands) -> Tensor:
    """Chunks [2 C, B, H, L, ...] as [B, H, T, ...]."""
    return x.movedim(0, 2).flatten(2, 3)[:, :, : operands.student_q.shape[2]]
