"""The chunked torch backend: any device, memory linear in the sequence, no n x n tensor kept for backward.

Each segment is treated as a sequence of its own: its tokens are gathered side by side, so what remains is a
dense causal problem. Segments of like length are stacked, with the padding behind the last token, where
causality already keeps it from every real row. Rows are taken in chunks; a chunk sees all its keys at once,
so its softmax needs no statistics from another pass, and forward and gradient of a chunk can come from the
same visit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Logits a buffer, of four: few enough on CPU to stay near the cache, enough on a GPU to fill it.
_CPU_LOGITS = 2**20
_GPU_LOGITS = 2**25
_ROWS = 64


class Operands(NamedTuple):
    """What both public functions come down to: q [B, H, T, D], k [B, Hkv, T, D]; no autograd history."""

    student_q: Tensor
    student_k: Tensor
    teacher_q: Tensor
    teacher_k: Tensor
    self_relation: bool  # the keys are the queries; their two gradients are then wanted as one sum


class _Block(NamedTuple):
    """Some sequences of equal length, and some key heads of theirs."""

    batch: Tensor | slice  # [n] int64, the batch row of each sequence
    tokens: Tensor | None  # [n, L] int64; None = the whole rows of `batch`, in place
    real: Tensor | None  # [n, L] bool; None = all
    heads: slice  # of the Hkv key heads


def forward(operands: Operands, softmax_scale: float, segment_ids: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Rows [B, H, T], and the statistics that backward wants: none, a chunk makes its own."""
    rows, _, _ = _visit(operands, softmax_scale, segment_ids, None, want_value=True)
    assert rows is not None
    return rows, ()


def backward(
    operands: Operands,
    softmax_scale: float,
    segment_ids: Tensor | None,
    statistics: Sequence[Tensor],
    row_grad: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of student_q and student_k; for a self-relation their sum, and None."""
    _, grad_q, grad_k = _visit(operands, softmax_scale, segment_ids, row_grad, want_value=False)
    assert grad_q is not None
    return grad_q, grad_k


def value_and_grad(
    operands: Operands, softmax_scale: float, segment_ids: Tensor | None, row_grad: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows and both gradients, logits and exponentials computed once."""
    rows, grad_q, grad_k = _visit(operands, softmax_scale, segment_ids, row_grad, want_value=True)
    assert rows is not None and grad_q is not None
    return rows, grad_q, grad_k


def _visit(
    operands: Operands,
    softmax_scale: float,
    segment_ids: Tensor | None,
    row_grad: Tensor | None,
    *,
    want_value: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Rows and gradients in one visit of each chunk.

    Args:
        operands: see `Operands`.
        softmax_scale: factor of the logits.
        segment_ids: integer [B, T] or None.
        row_grad: [B, H, T], upstream gradient of the rows; None = no gradient wanted.
        want_value: whether the rows are wanted.

    Returns:
        (rows [B, H, T] float32, float64 for float64 inputs; gradient of student_q; gradient of student_k),
        each None where not wanted.
    """
    q, k = operands.student_q, operands.student_k
    (batch, heads, seq_len, _), key_heads = q.shape, k.shape[1]
    group = heads // key_heads
    own = operands.self_relation
    dtype = torch.promote_types(q.dtype, torch.float32)

    rows = torch.zeros(batch, heads, seq_len, dtype=dtype, device=q.device) if want_value else None
    grad_q = torch.zeros_like(q) if row_grad is not None else None
    grad_k = None
    if row_grad is not None and not own:
        grad_k = torch.zeros_like(k)

    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        workspace: Tensor | None = None
        for block in _blocks(q, key_heads, segment_ids):
            query_heads = slice(block.heads.start * group, block.heads.stop * group)
            k_s = _take(operands.student_k, block, block.heads).to(dtype)
            k_t = _take(operands.teacher_k, block, block.heads).to(dtype)
            q_s = k_s if own else _take(operands.student_q, block, query_heads).to(dtype)
            q_t = k_t if own else _take(operands.teacher_q, block, query_heads).to(dtype)
            n, h, length, dim = k_s.shape
            g = None
            if row_grad is not None:
                g = _take(row_grad, block, query_heads).to(dtype)
                if block.real is not None:
                    g = g * block.real[:, None]
                g = g.reshape(n * h, group, length)
            size = n * h * group * min(_ROWS, length) * length
            if workspace is None or workspace.numel() < 4 * size:
                workspace = torch.empty(4 * size, dtype=dtype, device=q.device)
            kl, dq, dk = _dense(
                q_s.reshape(n * h, group, length, dim),
                k_s.reshape(n * h, length, dim),
                q_t.reshape(n * h, group, length, dim),
                k_t.reshape(n * h, length, dim),
                softmax_scale,
                g,
                want_value,
                workspace,
            )
            if rows is not None and kl is not None:
                _put(rows, block, query_heads, kl.view(n, h * group, length))
            if grad_q is not None and dq is not None and dk is not None:
                if own:
                    _put(grad_q, block, query_heads, dk.add_(dq.view_as(dk)).view(n, h, length, dim))
                else:
                    assert grad_k is not None
                    _put(grad_q, block, query_heads, dq.view(n, h * group, length, dim))
                    _put(grad_k, block, block.heads, dk.view(n, h, length, dim))
    return rows, grad_q, grad_k


def _dense(
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    scale: float,
    row_grad: Tensor | None,
    want_value: bool,
    workspace: Tensor,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Causal sequences without segments: q [N, G, L, D], k [N, L, D], row_grad [N, G, L].

    Student and teacher go through the same operations on buffers of the same shape, so that equal inputs give
    equal logits bit for bit, hence a divergence and a gradient of exactly 0.
    """
    n, group, length, dim = q_s.shape
    kl = q_s.new_empty(n, group, length) if want_value else None
    dq = torch.empty_like(q_s) if row_grad is not None else None
    dk = torch.zeros_like(k_s) if row_grad is not None else None
    above = torch.ones(_ROWS, _ROWS, dtype=torch.bool, device=q_s.device).triu_(1)

    for start in range(0, length, _ROWS):
        end = min(start + _ROWS, length)
        rows = end - start
        shape = (n, group * rows, end)
        size = n * group * rows * end
        s, t, p_s, p_t = (workspace[i * size : (i + 1) * size].view(shape) for i in range(4))
        future = above[:rows, :rows]

        def diagonal(logits: Tensor, start: int = start, rows: int = rows, end: int = end) -> Tensor:
            return logits.view(n, group, rows, end)[..., start:]

        x_s = (q_s[:, :, start:end] * scale).reshape(n, group * rows, dim)
        x_t = (q_t[:, :, start:end] * scale).reshape(n, group * rows, dim)
        keys = k_s[:, :end]
        torch.bmm(x_s, keys.mT, out=s)
        torch.bmm(x_t, k_t[:, :end].mT, out=t)
        diagonal(s).masked_fill_(future, float("-inf"))
        diagonal(t).masked_fill_(future, float("-inf"))
        torch.softmax(s, -1, out=p_s)
        torch.softmax(t, -1, out=p_t)

        if kl is not None:
            # With Z = S - max S, KL = sum Pt (Zt - Zs) + log max Pt - log max Ps, for 1 / sum e^Z is max P.
            # The maxima, which may be large where the divergence is tiny, never enter a sum.
            s.sub_(s.amax(-1, keepdim=True))
            t.sub_(t.amax(-1, keepdim=True)).sub_(s)
            diagonal(t).masked_fill_(future, 0.0)
            divergence = t.mul_(p_t).sum(-1) + (p_t.amax(-1).log() - p_s.amax(-1).log())
            kl[:, :, start:end] = divergence.view(n, group, rows)

        if row_grad is not None and dq is not None and dk is not None:
            ds = p_s.sub_(p_t).mul_(row_grad[:, :, start:end].reshape(n, group * rows, 1))
            dq[:, :, start:end] = torch.bmm(ds, keys).mul_(scale).view(n, group, rows, dim)
            dk[:, :end].baddbmm_(ds.mT, x_s)
    return kl, dq, dk


def logits_budget(device: torch.device) -> int:
    """Logits that a buffer may hold on a device."""
    return _CPU_LOGITS if device.type == "cpu" else _GPU_LOGITS


def _blocks(q: Tensor, key_heads: int, segment_ids: Tensor | None) -> Iterator[_Block]:
    """Cut the problem into blocks whose chunks of logits fit the budget."""
    batch, heads, seq_len, _ = q.shape
    budget = logits_budget(q.device)
    if segment_ids is None:
        for rows, head_range in _cut(batch, seq_len, heads, key_heads, budget):
            yield _Block(rows, None, None, head_range)
        return
    for length, rows, tokens, real in _stacks(segment_ids):
        for cut, head_range in _cut(tokens.shape[0], length, heads, key_heads, budget):
            part = real[cut] if real is not None else None
            yield _Block(rows[cut], tokens[cut], part, head_range)


def _cut(sequences: int, length: int, heads: int, key_heads: int, budget: int) -> Iterator[tuple[slice, slice]]:
    """Ranges of sequences and of key heads, as many at once as the budget allows, one at least."""
    fit = max(1, budget // (heads // key_heads * min(_ROWS, length) * length))
    head_step = min(fit, key_heads)
    sequence_step = max(1, fit // key_heads)
    for i in range(0, sequences, sequence_step):
        for h in range(0, key_heads, head_step):
            yield slice(i, min(i + sequence_step, sequences)), slice(h, min(h + head_step, key_heads))


def _stacks(segment_ids: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor | None]]:
    """Segments grouped by length: (L, batch row [n], tokens [n, L], real [n, L] or None where all are).

    The lengths are needed on the host: on a GPU this waits for the device once a call.
    """
    batch, seq_len = segment_ids.shape
    ids = segment_ids.cpu().long().clamp(min=-1)
    ordered, order = ids.sort(dim=-1, stable=True)
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    begin = starts.flatten().nonzero().flatten()
    lengths = torch.diff(begin, append=torch.tensor([batch * seq_len]))
    alive = ordered.flatten()[begin] >= 0
    begin, lengths = begin[alive], lengths[alive]

    # Few distinct lengths make few, large stacks; rounding up costs little once segments are long.
    rounded = torch.where(lengths > 64, (lengths + 31) // 32 * 32, (lengths + 7) // 8 * 8)
    for target in rounded.unique().tolist():
        chosen = rounded == target
        count = lengths[chosen]
        length = int(count.max())
        offset = torch.arange(length)
        real = offset < count[:, None]
        # Behind its end a shorter segment repeats its last token: finite values that no real row sees.
        place = begin[chosen, None] + torch.minimum(offset, count[:, None] - 1)
        tokens = order.flatten()[place].to(segment_ids.device)
        rows = (begin[chosen] // seq_len).to(segment_ids.device)
        yield length, rows, tokens, None if bool(real.all()) else real.to(segment_ids.device)


def _take(x: Tensor, block: _Block, heads: slice) -> Tensor:
    """The block's part of [B, H, T, ...], as [n, h, L, ...]; a view where the block has whole rows."""
    x = x[:, heads]
    if block.tokens is None:
        return x[block.batch]
    assert isinstance(block.batch, Tensor)
    return x.transpose(1, 2)[block.batch[:, None], block.tokens].transpose(1, 2)


def _put(target: Tensor, block: _Block, heads: slice, values: Tensor) -> None:
    """Write [n, h, L, ...] back to where `_take` took it from."""
    target = target[:, heads]
    if block.tokens is None:
        target[block.batch] = values.to(target.dtype)
        return
    assert isinstance(block.batch, Tensor)
    rows = block.batch[:, None].expand_as(block.tokens)
    tokens, values = block.tokens, values.transpose(1, 2)
    if block.real is not None:
        rows, tokens, values = rows[block.real], tokens[block.real], values[block.real]
    target.transpose(1, 2)[rows, tokens] = values.to(target.dtype)
