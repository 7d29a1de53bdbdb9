"""Visits in PyTorch, on any device: the rows of one chunk against the keys of one chunk, see `Visit`.

What a rank of a sequence-parallel group computes, and what a rank that shares a head's rows with others computes, is
made of visits; `triton_visit` has them as kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .torch_backend import Operands, logits_budget

_LOG2_E = 1.4426950408889634
_LN2 = 0.6931471805599453
# Stands for -inf, but its differences are no NaN.
_MASKED = -1e30
# A sum that is larger is moved into its pivot, so that dividing by it loses nothing.
LARGE = 2.0**80


class Visit(NamedTuple):
    """Rows and keys, none of which comes after any row, or the chunk with itself (`diagonal`).

    Vectors may have any strides, ids are contiguous; rows and keys whose ids are negative may hold anything.
    """

    q_s: Tensor  # [B, H, R, D]
    q_t: Tensor
    k_s: Tensor  # [B, Hkv, N, D]
    k_t: Tensor
    row_ids: Tensor | None  # int64 [B, R]
    key_ids: Tensor | None  # int64 [B, N]
    diagonal: bool

    def of_heads(self, heads: slice, key_heads: slice) -> Visit:
        """Of some heads of the rows, and of their keys."""
        q_s, q_t = self.q_s[:, heads], self.q_t[:, heads]
        k_s, k_t = self.k_s[:, key_heads], self.k_t[:, key_heads]
        return self._replace(q_s=q_s, q_t=q_t, k_s=k_s, k_t=k_t)


@dataclass
class State:
    """Sums over the keys that rows have visited; float32 (float64 for float64 inputs), logits times log2 e.

    With Z = S - m:  total = sum 2^Z,  a = sum 2^Zt (Zt - Zs), s for student and t for teacher, in this order in m and
    total.  The pivots m are any numbers for which nothing overflows; states of the same rows add up after they were
    brought to the same pivots.
    """

    m: Tensor  # [2, B, H, R]
    total: Tensor  # [2, B, H, R]
    a: Tensor  # [B, H, R]

    @classmethod
    def start(cls, pivots: Tensor) -> State:
        """Of rows that have seen nothing yet; pivots like m."""
        sums = torch.zeros(5, *pivots.shape[1:], dtype=pivots.dtype, device=pivots.device)
        sums[:2] = pivots
        return cls(sums[:2], sums[2:4], sums[4])

    @classmethod
    def joined(cls, states: Sequence[State]) -> State:
        """Of the same rows, each after visits of other keys."""
        m = torch.stack([state.m for state in states]).amax(0)
        parts = zip(*(_lowered(state, m) for state in states), strict=True)
        return cls(m, *(torch.stack(part).sum(0) for part in parts))


def _lowered(state: State, m: Tensor) -> tuple[Tensor, Tensor]:
    """total and a relative to pivots that are not below the state's."""
    fall = state.m - m
    shrink = _exp2(fall)
    return state.total * shrink, torch.addcmul(state.a, state.total[1], fall[1] - fall[0]).mul_(shrink[1])


def _exp2(x: Tensor) -> Tensor:
    """2^x of student and of teacher [2, ...], each by itself: what is equal has to stay so, and on a CPU the last
    elements of a tensor are computed in another way than those before them."""
    found = torch.empty_like(x)
    for part, out in zip(x, found, strict=True):
        torch.exp2(part, out=out)
    return found


def working(x: Tensor) -> torch.dtype:
    """The type in which states and gradients of x are kept."""
    return torch.promote_types(x.dtype, torch.float32)


def exactly(function: Callable[..., Any]) -> Callable[..., Any]:
    """Of a backend's method: without autograd, and in the precision written down, as the torch backend computes."""

    @functools.wraps(function)
    def wrapped(self: Any, operands: Operands, *arguments: Any) -> Any:
        with torch.no_grad(), torch.autocast(operands.student_q.device.type, enabled=False):
            return function(self, operands, *arguments)

    return wrapped


def own_logits(q: Tensor, k: Tensor, scale: float, ids: Tensor | None) -> Tensor:
    """Each row's logit with its own key, times log2 e: the pivot to begin with; [B, H, T], 0 for padding.

    Args:
        q: [B, H, T, D].
        k: [B, Hkv, T, D].
        scale: softmax_scale.
        ids: [B, T] or None.
    """
    kind = working(q)
    if q is k:
        found = torch.linalg.vector_norm(q, dim=-1, dtype=kind).square_()
    else:
        batch, heads, seq_len, dim = q.shape
        found = torch.empty(batch, heads, seq_len, dtype=kind, device=q.device)
        step = max(1, logits_budget(q.device) // (batch * heads * dim))
        for start in range(0, seq_len, step):
            part = slice(start, start + step)
            x = q[:, :, part].to(kind).unflatten(1, (k.shape[1], -1))
            found[:, :, part] = (x * k[:, :, None, part].to(kind)).sum(-1).flatten(1, 2)
    found.mul_(scale * _LOG2_E)
    return found if ids is None else torch.where((ids >= 0)[:, None], found, 0.0)


def forward(visit: Visit, scale: float, state: State) -> None:
    """Adds what the rows see of the keys to their state, whose pivots rise to the largest logit."""
    for part in _row_parts(visit):
        logits, visible = _logits(visit, part, scale)
        if visible is not None:
            logits.masked_fill_(~visible, _MASKED)
        before = State(state.m[..., part], state.total[..., part], state.a[..., part])
        m = torch.maximum(before.m, logits.amax(-1))
        total, a = _lowered(before, m)
        logits -= m[..., None]
        p = _exp2(logits)
        state.m[..., part], state.total[..., part] = m, total + p.sum(-1)
        state.a[..., part] = a + (p[1] * (logits[1] - logits[0])).sum(-1)


def conclude(state: State, ids: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """What rows give that have seen all of their keys; `state` is used up.

    Args:
        state: of the rows.
        ids: [B, R] or None.

    Returns:
        The divergence of each row in nats, [B, H, R], 0 for padding; and m and total for backward: 2^(S - m) / total is
        the probability, and total is above 0, also for padding.
    """
    m, total = state.m, state.total
    values = (state.a / total[1] - (total[1].log2() - total[0].log2())) * _LN2
    if ids is not None:
        values = torch.where((ids >= 0)[:, None], values, 0.0)
    large = total > LARGE
    m = torch.where(large, m + total.log2(), m)
    return values, (m, torch.where(large | (total == 0), 1.0, total))


def prepare(row_grad: Tensor, dtype: torch.dtype, scale: float, group: Any) -> tuple[Tensor, Tensor | None]:
    """An upstream gradient [B, H, T] as `backward` takes it, and what its results are to be multiplied with, or None.

    Args:
        row_grad: of this process's rows; 0 for padding.
        dtype: of q and k.
        scale: softmax_scale.
        group: processes that visit each other's rows, or None.
    """
    return row_grad * scale, None


def gradient_shape(x: Tensor) -> tuple[int, ...]:
    """Of the buffer, zero at first, in which `backward` adds up the gradient of x [B, H, N, D].

    Gradients of chunks of the same shape can be added up and exchanged between processes; `finish` reads them.
    """
    return x.shape


def finish(grad: Tensor, unit: Tensor | None, out: Tensor) -> None:
    """Writes a gradient from its buffer.

    Args:
        grad: of `gradient_shape`.
        unit: from `prepare`.
        out: [B, H, N, D], of the inputs' type, any strides.
    """
    out.copy_(grad if unit is None else grad * unit)


def backward(
    visit: Visit, scale: float, statistics: Sequence[Tensor], row_grad: Tensor, q_grad: Tensor, k_grad: Tensor
) -> None:
    """Adds to the gradients of the rows and of the keys.

    Args:
        visit: what to visit.
        scale: softmax_scale.
        statistics: m and total of the rows over all of their keys (`conclude`).
        row_grad: from `prepare`.
        q_grad: of `gradient_shape`, contiguous but for the first dimension, in the type `working` for the inputs'.
        k_grad: as q_grad; the same memory for the chunk with itself in a self-relation.
    """
    keys = visit.k_s.to(q_grad.dtype)
    if visit.key_ids is not None:
        keys = torch.where((visit.key_ids >= 0)[:, None, :, None], keys, 0.0)
    for part in _row_parts(visit):
        logits, visible = _logits(visit, part, scale)
        m, total = (x[..., part, None] for x in statistics)
        p_s, p_t = _exp2(logits - m) / total
        w = (p_s - p_t) * row_grad[:, :, part, None]
        x = visit.q_s[:, :, part].to(q_grad.dtype)
        if visible is not None:
            w = w.masked_fill(~visible, 0.0)
        if visit.row_ids is not None:
            x = torch.where((visit.row_ids[:, None, part, None] >= 0), x, 0.0)
        batch, heads, rows, count = w.shape
        shared = w.reshape(batch, keys.shape[1], -1, count)
        q_grad[:, :, part] += (shared @ keys).view(batch, heads, rows, -1)
        k_grad += shared.mT @ x.reshape(batch, keys.shape[1], -1, x.shape[3])


def _logits(visit: Visit, part: slice, scale: float) -> tuple[Tensor, Tensor | None]:
    """Logits [2, B, H, rows, N] of student and teacher, times log2 e, and which are visible, or None for all."""
    count, (batch, key_heads, keys, _) = visit.q_s[:, :, part].shape[2], visit.k_s.shape
    found = torch.empty(
        2,
        batch,
        key_heads,
        visit.q_s.shape[1] // key_heads * count,
        keys,
        dtype=working(visit.q_s),
        device=visit.q_s.device,
    )
    for q, k, out in zip((visit.q_s, visit.q_t), (visit.k_s, visit.k_t), found, strict=True):
        rows = q[:, :, part].to(out.dtype) * (scale * _LOG2_E)
        torch.matmul(rows.reshape(*out.shape[:3], -1), k.to(out.dtype).mT, out=out)
    visible = None
    if visit.key_ids is not None and visit.row_ids is not None:
        same = visit.row_ids[:, part, None] == visit.key_ids[:, None]
        visible = (same & (visit.key_ids >= 0)[:, None])[:, None]
    if visit.diagonal:
        index = torch.arange(visit.k_s.shape[2], device=visit.k_s.device)
        causal = (index <= index[part, None])[None, None]
        visible = causal if visible is None else visible & causal
    return found.view(2, batch, -1, count, keys), visible


def _row_parts(visit: Visit) -> list[slice]:
    """Rows at once, so that a buffer of logits keeps to its budget."""
    q, k = visit.q_s, visit.k_s
    step = max(1, logits_budget(q.device) // (q.shape[0] * q.shape[1] * max(1, k.shape[2])))
    return [slice(i, min(i + step, q.shape[2])) for i in range(0, q.shape[2], step)]
