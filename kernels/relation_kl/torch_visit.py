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
_LARGE = 2.0**80


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
    """Sums over the keys that rows have visited; float32 [B, H, R] (float64 for float64 inputs), logits times log2 e.

    With Z = S - m:  l = sum 2^Z of student and of teacher,  a = sum 2^Zt (Zt - Zs).  The pivots m are any numbers for
    which nothing overflows; states of the same rows add up after they were brought to the same pivots.
    """

    m_s: Tensor
    m_t: Tensor
    l_s: Tensor
    l_t: Tensor
    a: Tensor

    @classmethod
    def start(cls, m_s: Tensor, m_t: Tensor) -> State:
        """Of rows that have seen nothing yet."""
        return cls(m_s.clone(), m_t.clone(), *(torch.zeros_like(m_s) for _ in range(3)))

    @classmethod
    def joined(cls, states: Sequence[State]) -> State:
        """Of the same rows, each after visits of other keys."""
        fields = ("m_s", "m_t", "l_s", "l_t", "a")
        every = cls(*(torch.stack([getattr(state, name) for state in states]) for name in fields))
        m_s, m_t = every.m_s.amax(0), every.m_t.amax(0)
        return cls(m_s, m_t, *(x.sum(0) for x in _lowered(every, m_s, m_t)))

    def rows(self, ids: Tensor | None) -> Tensor:
        """The divergence of each row in nats; 0 for padding."""
        value = (self.a / self.l_t - (self.l_t.log2() - self.l_s.log2())) * _LN2
        return value if ids is None else torch.where((ids >= 0)[:, None], value, 0.0)

    def statistics(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """m_s, m_t, l_s, l_t for backward: 2^(S - m) / l is the probability; l is above 0, also for padding."""

        def tame(m: Tensor, l: Tensor) -> tuple[Tensor, Tensor]:  # noqa: E741
            large = l > _LARGE
            return torch.where(large, m + l.log2(), m), torch.where(large | (l == 0), 1.0, l)

        (m_s, l_s), (m_t, l_t) = tame(self.m_s, self.l_s), tame(self.m_t, self.l_t)
        return m_s, m_t, l_s, l_t


def _lowered(state: State, m_s: Tensor, m_t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """l_s, l_t and a relative to pivots that are not below the state's."""
    fall_s, fall_t = state.m_s - m_s, state.m_t - m_t
    shrink = fall_t.exp2()
    a = torch.addcmul(state.a, state.l_t, fall_t - fall_s).mul_(shrink)
    return state.l_s * fall_s.exp2(), state.l_t * shrink, a


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


def forward(visit: Visit, scale: float, pivots: tuple[Tensor, Tensor]) -> State:
    """What the rows see of the keys; the pivots are not needed here, a running maximum is kept."""
    low = torch.full_like(pivots[0], _MASKED)
    zero = torch.zeros_like(low)
    total = State(low, low.clone(), zero, zero.clone(), zero.clone())
    for part in _row_parts(visit):
        s, t, visible = _logits(visit, part, scale)
        if visible is not None:
            s, t = s.masked_fill(~visible, _MASKED), t.masked_fill(~visible, _MASKED)
        m_s, m_t = s.amax(-1), t.amax(-1)
        s, t = s - m_s[..., None], t - m_t[..., None]
        p_t = t.exp2()
        found = m_s, m_t, s.exp2().sum(-1), p_t.sum(-1), (p_t * (t - s)).sum(-1)
        for target, value in zip((total.m_s, total.m_t, total.l_s, total.l_t, total.a), found, strict=True):
            target[:, :, part] = value
    return total


def add(state: State, other: State) -> None:
    """Put into `state` what the same rows saw in another visit, too."""
    m_s, m_t = torch.maximum(state.m_s, other.m_s), torch.maximum(state.m_t, other.m_t)
    mine, theirs = _lowered(state, m_s, m_t), _lowered(other, m_s, m_t)
    state.m_s, state.m_t = m_s, m_t
    state.l_s, state.l_t, state.a = (x.add_(y) for x, y in zip(mine, theirs, strict=True))


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
        statistics: m_s, m_t, l_s, l_t of the rows over all of their keys (`State.statistics`).
        row_grad: from `prepare`.
        q_grad: of `gradient_shape`, contiguous but for the first dimension, in the type `working` for the inputs'.
        k_grad: as q_grad; the same memory for the chunk with itself in a self-relation.
    """
    keys = visit.k_s.to(q_grad.dtype)
    if visit.key_ids is not None:
        keys = torch.where((visit.key_ids >= 0)[:, None, :, None], keys, 0.0)
    for part in _row_parts(visit):
        s, t, visible = _logits(visit, part, scale)
        m_s, m_t, l_s, l_t = (x[:, :, part, None] for x in statistics)
        w = ((s - m_s).exp2() / l_s - (t - m_t).exp2() / l_t) * row_grad[:, :, part, None]
        x = visit.q_s[:, :, part].to(q_grad.dtype)
        if visible is not None:
            w = w.masked_fill(~visible, 0.0)
        if visit.row_ids is not None:
            x = torch.where((visit.row_ids[:, None, part, None] >= 0), x, 0.0)
        batch, heads, rows, count = w.shape
        shared = w.reshape(batch, keys.shape[1], -1, count)
        q_grad[:, :, part] += (shared @ keys).view(batch, heads, rows, -1)
        k_grad += shared.mT @ x.reshape(batch, keys.shape[1], -1, x.shape[3])


def _logits(visit: Visit, part: slice, scale: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """Student's and teacher's logits [B, H, rows, N], times log2 e, and which are visible, or None for all."""

    def product(q: Tensor, k: Tensor) -> Tensor:
        q = q[:, :, part].to(working(q)) * (scale * _LOG2_E)
        batch, heads, rows, dim = q.shape
        return (q.reshape(batch, k.shape[1], -1, dim) @ k.to(q.dtype).mT).view(batch, heads, rows, -1)

    visible = None
    if visit.key_ids is not None and visit.row_ids is not None:
        same = visit.row_ids[:, part, None] == visit.key_ids[:, None]
        visible = (same & (visit.key_ids >= 0)[:, None])[:, None]
    if visit.diagonal:
        index = torch.arange(visit.k_s.shape[2], device=visit.k_s.device)
        causal = (index <= index[part, None])[None, None]
        visible = causal if visible is None else visible & causal
    return product(visit.q_s, visit.k_s), product(visit.q_t, visit.k_t), visible


def _row_parts(visit: Visit) -> list[slice]:
    """Rows at once, so that a buffer of logits keeps to its budget."""
    q, k = visit.q_s, visit.k_s
    step = max(1, logits_budget(q.device) // (q.shape[0] * q.shape[1] * max(1, k.shape[2])))
    return [slice(i, min(i + step, q.shape[2])) for i in range(0, q.shape[2], step)]
