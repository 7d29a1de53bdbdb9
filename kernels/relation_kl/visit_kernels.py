"""The small kernels beside visits: pivots to begin with, and the sum of what rows saw in two visits."""

# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl


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


@triton.jit(do_not_specialize=["count"])
def add_kernel(
    m_s, m_t, l_s, l_t, a, other_m_s, other_m_t, other_l_s, other_l_t, other_a, count, BLOCK: tl.constexpr
):  # fmt: skip
    """`torch_visit.add`, in place, of `count` rows; all contiguous."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < count
    mine_s = tl.load(m_s + rows, mask=inside, other=0.0)
    mine_t = tl.load(m_t + rows, mask=inside, other=0.0)
    theirs_s = tl.load(other_m_s + rows, mask=inside, other=0.0)
    theirs_t = tl.load(other_m_t + rows, mask=inside, other=0.0)
    pivot_s, pivot_t = tl.maximum(mine_s, theirs_s), tl.maximum(mine_t, theirs_t)
    tl.store(m_s + rows, pivot_s, mask=inside)
    tl.store(m_t + rows, pivot_t, mask=inside)
    mine_s, mine_t, theirs_s, theirs_t = mine_s - pivot_s, mine_t - pivot_t, theirs_s - pivot_s, theirs_t - pivot_t
    sum_s = tl.load(l_s + rows, mask=inside, other=0.0) * tl.exp2(mine_s)
    sum_s += tl.load(other_l_s + rows, mask=inside, other=0.0) * tl.exp2(theirs_s)
    tl.store(l_s + rows, sum_s, mask=inside)
    x, y = tl.load(l_t + rows, mask=inside, other=0.0), tl.load(other_l_t + rows, mask=inside, other=0.0)
    fall, other_fall = tl.exp2(mine_t), tl.exp2(theirs_t)
    tl.store(l_t + rows, x * fall + y * other_fall, mask=inside)
    found = (tl.load(a + rows, mask=inside, other=0.0) + x * (mine_t - mine_s)) * fall
    found += (tl.load(other_a + rows, mask=inside, other=0.0) + y * (theirs_t - theirs_s)) * other_fall
    tl.store(a + rows, found, mask=inside)
