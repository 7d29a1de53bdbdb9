"""The small kernels beside visits: pivots to begin with, and what rows give at the end."""

# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

_LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["heads", "group", "seq_len"])
def own_logits_kernel(
    q, k, q_strides, k_strides, ids, ids_strides, out, heads, group, seq_len, factor,
    channels: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """out [B, H, T], contiguous, = factor * q . k of each token, 0 for padding; ROWS tokens of a head a program."""
    tiles = tl.cdiv(seq_len, ROWS)
    sequence = tl.program_id(0) // tiles
    batch, head = (sequence // heads).to(tl.int64), (sequence % heads).to(tl.int64)
    rows = (tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.arange(0, D).to(tl.int64)
    inside = (rows < seq_len)[:, None] & (columns < channels)[None, :]
    q += batch * q_strides[0] + head * q_strides[1]
    k += batch * k_strides[0] + head // group * k_strides[1]
    x = tl.load(q + rows[:, None] * q_strides[2] + columns[None, :] * q_strides[3], mask=inside, other=0.0)
    y = tl.load(k + rows[:, None] * k_strides[2] + columns[None, :] * k_strides[3], mask=inside, other=0.0)
    found = tl.sum(x.to(tl.float32) * y.to(tl.float32), 1) * factor
    if SEGMENTS:
        names = tl.load(ids + batch * ids_strides[0] + rows * ids_strides[1], mask=rows < seq_len, other=-1)
        found = tl.where(names >= 0, found, 0.0)
    tl.store(out + sequence.to(tl.int64) * seq_len + rows, found, mask=rows < seq_len)


@triton.jit(do_not_specialize=["count", "of_batch", "seq_len"])
def conclude_kernel(
    m, total, a, ids, count, of_batch, seq_len, large, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """`torch_visit.conclude`, in place, of `count` rows, `of_batch` of each entry of the batch; all contiguous."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < count
    l_s, l_t = tl.load(total + rows, mask=inside, other=1.0), tl.load(total + count + rows, mask=inside, other=1.0)
    log_s, log_t = tl.log2(l_s), tl.log2(l_t)
    value = (tl.load(a + rows, mask=inside, other=0.0) / l_t - (log_t - log_s)) * _LN2
    if SEGMENTS:
        names = tl.load(ids + rows // of_batch * seq_len + rows % seq_len, mask=inside, other=-1)
        value = tl.where(names >= 0, value, 0.0)
    tl.store(a + rows, value, mask=inside)
    m_s, m_t = tl.load(m + rows, mask=inside, other=0.0), tl.load(m + count + rows, mask=inside, other=0.0)
    tl.store(m + rows, tl.where(l_s > large, m_s + log_s, m_s), mask=inside)
    tl.store(m + count + rows, tl.where(l_t > large, m_t + log_t, m_t), mask=inside)
    tl.store(total + rows, tl.where((l_s > large) | (l_s == 0), 1.0, l_s), mask=inside)
    tl.store(total + count + rows, tl.where((l_t > large) | (l_t == 0), 1.0, l_t), mask=inside)
