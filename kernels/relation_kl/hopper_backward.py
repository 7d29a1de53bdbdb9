"""The Hopper backward kernel; see hopper_common.py for what it shares with the forward kernel.

Gradients that several programs add to are float32 in register order: 64 tokens lie as the 128 threads of a warpgroup
hold them, [2, D / 16, 128, 4], which is half of the channels, 8 of its channels, a thread, and this thread's 2 x 2
numbers of tokens r and r + 8 and of neighbouring channels. So each thread puts 16 bytes beside those of the thread
before it into shared memory, and TMA reads 16 KiB in a row. `finish_kernel` brings them into order.
"""

# What the decorators make of these functions is not what pyright reads.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_common import HALF_ROWS, ROWS, barrier, exponent, logits, names_of, own_logits, span, visible_pairs


@builtin
def _reduce_add(descriptor, coordinates, source, _semantic: Any = None):
    """Add a tile of shared memory to device memory, asynchronously. Gluon has no name for it, but Triton's builder."""
    coordinates = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, descriptor.handle, coordinates, source.handle)


@gluon.jit
def _in_register_order(x):
    """An accumulator [64, D] as its two halves of channels [D / 8, 256] in register order."""
    D: gl.constexpr = x.shape[1]
    # [warp, r or r + 8, row, half, 8 channels, pair, channel]
    x = x.reshape([4, 2, 8, 2, D // 16, 4, 2]).permute(3, 4, 0, 2, 5, 1, 6)
    return x.reshape([2, D // 8, 256]).permute(1, 2, 0).split()


@gluon.jit
def _clear_padding(tile, segments, start, seq_len):
    """Set the tokens of padding of a tile [R, D] in shared memory to 0: they may hold anything, NaN included."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    names = names_of(segments, start + gl.arange(0, tile.shape[0], gl.SliceLayout(1, LAYOUT)), seq_len)
    if gl.min(names, 0) < 0:
        x = tile.load(LAYOUT)
        tile.store(gl.where((names >= 0)[:, None], x, gl.zeros_like(x)))
        fence_async_shared()


@gluon.jit
def _without_invisible(
    w, room, segments, row_start, key_start, seq_len, keys_end, SEGMENTS: gl.constexpr, VISIT: gl.constexpr
):  # fmt: skip
    """The weights w [64, N] with those of invisible pairs set to 0, in shared memory (room): with masks in registers,
    ptxas spills others in the loop around it."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    tma.store_wait(0)  # what lay there before is on its way
    barrier()
    room.store(w)
    barrier()
    rows = row_start + gl.arange(0, w.shape[0], gl.SliceLayout(1, LAYOUT))
    keys = key_start + gl.arange(0, w.shape[1], gl.SliceLayout(0, LAYOUT))
    x = room.load(LAYOUT)
    visible = visible_pairs(segments, rows, keys, seq_len, keys_end, SEGMENTS, VISIT)
    room.store(gl.where(visible, x, gl.zeros_like(x)))
    barrier()
    return room.load(w.type.layout)


@gluon.jit
def _turned(j, tile, begin, count, VISIT: gl.constexpr):
    """Which tile of keys comes j-th of the `count` from `begin` on: in a visit each row tile begins elsewhere, so that
    those which run together do not all add to the same gradient."""
    if VISIT:
        j += tile % count
        j = begin + gl.where(j >= count, j - count, j)
    return j


@gluon.jit
def _backward_fetch(
    k_s, k_t, batch, key_head, tile, last, begin, count, ring_s, ring_t, ready_s, ready_t, free_s, free_t,
    N: gl.constexpr, D: gl.constexpr, VISIT: gl.constexpr,
):  # fmt: skip
    """Fetch the tiles of keys: two buffers for the student's, which are used twice, one for the teacher's."""
    for j in range(count):
        at = [batch, key_head, last - _turned(j, tile, begin, count, VISIT) * N, 0]
        slot = j % 2
        mbarrier.wait(free_s.index(slot), ((j // 2) & 1) ^ 1)
        mbarrier.expect(ready_s.index(slot), N * D * 2)
        tma.async_copy_global_to_shared(k_s, at, ready_s.index(slot), ring_s.index(slot))
        mbarrier.wait(free_t, (j & 1) ^ 1)
        mbarrier.expect(ready_t, N * D * 2)
        tma.async_copy_global_to_shared(k_t, at, ready_t, ring_t.index(0))


@gluon.jit
def _add_up(x, descriptor, batch, head, block, left, right):
    """Add 64 tokens [64, D] to a gradient in register order; left and right are buffers for half of it each."""
    D: gl.constexpr = x.shape[1]
    first, second = _in_register_order(x)
    left.reshape([D // 8, 256]).store(first)
    right.reshape([D // 8, 256]).store(second)
    _send(descriptor, batch, head, block, left, right, D)


@gluon.jit
def _send(descriptor, batch, head, block, left, right, D: gl.constexpr):
    fence_async_shared()
    barrier()
    _reduce_add(descriptor, [batch, head, block * (D // 4), 0], left)
    _reduce_add(descriptor, [batch, head, block * (D // 4) + D // 8, 0], right)


@gluon.jit
def _backward_rows(
    segments, pivot_s, pivot_t, sum_s, sum_t, row_grad, unit, key_grad, grad,
    batch, head, heads, key_head, tile_start, last, begin, count, full, seq_len, first_row, keys_end, channels,
    log2_scale, softmax_scale, own_s, own_t, own_ready, ring_s, ring_t, ready_s, ready_t, free_s, free_t,
    weights, weights_ready, weights_free, stage,
    HALF: gl.constexpr, N: gl.constexpr, D: gl.constexpr, K: gl.constexpr, SEGMENTS: gl.constexpr, SELF: gl.constexpr,
    NARROW: gl.constexpr, VISIT: gl.constexpr,
):  # fmt: skip
    """64 rows and, of each tile of keys, 64 keys, for which both warpgroups' weights are needed."""
    dtype: gl.constexpr = ring_s.dtype
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    mma_d: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    OF_ROWS: gl.constexpr = gl.SliceLayout(1, mma)
    OF_KEYS: gl.constexpr = gl.SliceLayout(0, mma)
    OF_PRODUCT: gl.constexpr = gl.DotOperandLayout(0, mma_d, 2)
    start = tile_start + HALF * HALF_ROWS
    rows = start + gl.arange(0, HALF_ROWS, OF_ROWS)
    live = rows < seq_len
    if SEGMENTS:
        live = names_of(segments, rows, seq_len) >= 0
    if VISIT:
        place = (batch * heads + head).to(gl.int64) * (seq_len - first_row) + rows - first_row
    else:
        place = (batch * heads + head).to(gl.int64) * seq_len + rows
    l_s = gl.load(sum_s + place, mask=live, other=1.0)
    l_t = gl.load(sum_t + place, mask=live, other=1.0)
    g = gl.load(row_grad + place, mask=live, other=0.0)
    none = gl.zeros([HALF_ROWS, N], gl.float32, mma)
    none_d = gl.zeros([HALF_ROWS, D], gl.float32, mma_d)
    acc = gl.zeros([HALF_ROWS, D], gl.float32, mma_d)

    mbarrier.wait(own_ready, 0)
    if SEGMENTS:
        _clear_padding(own_s.index(HALF).reshape([HALF_ROWS, D]), segments, start, seq_len)
        _clear_padding(own_t.index(HALF).reshape([HALF_ROWS, D]), segments, start, seq_len)
        barrier()
    mbarrier.wait(ready_s.index(0), 0)
    y = ring_s.index(0).reshape([N, D])
    s = logits(own_s.index(HALF).reshape([HALF_ROWS, D]), y, none, K)
    mbarrier.wait(ready_t, 0)
    y = ring_t.index(0).reshape([N, D])
    t = logits(own_t.index(HALF).reshape([HALF_ROWS, D]), y, none, K)
    s, t = warpgroup_mma_wait(0, deps=[s, t])
    mbarrier.arrive(free_t)
    # W = g (e_s / l_s - e_t / l_t) = (e_s r - e_t) g / l_t: r is 1, and W is 0, where student and teacher are equal.
    if VISIT:
        m_s = gl.load(pivot_s + place, mask=live, other=0.0)
        m_t = gl.load(pivot_t + place, mask=live, other=0.0)
    else:
        keys = last + gl.arange(0, N, OF_KEYS)
        m_s = gl.where(live, own_logits(s, rows, keys, log2_scale) - gl.minimum(l_s, 0.0), 0.0)
        m_t = gl.where(live, own_logits(t, rows, keys, log2_scale) - gl.minimum(l_t, 0.0), 0.0)
        l_s = gl.where(l_s > 0, l_s, 1.0)
        l_t = gl.where(l_t > 0, l_t, 1.0)
    r = gl.div_rn(l_t, l_s)
    g = g / l_t
    e_s = gl.exp2(exponent(s, log2_scale, m_s))

    for j in range(count):
        turned = _turned(j, tile_start // ROWS, begin, count, VISIT)
        key_start = last - turned * N
        slot = j % 2
        following = slot ^ 1
        # Always 0, which the compiler cannot know: it would keep the operands' 64-bit descriptors over the whole
        # loop, more than there are registers for, where a few additions make them anew.
        fresh = j >> 30
        e_t = gl.exp2(exponent(t, log2_scale, m_t))
        w = (gl.fma(e_s, gl.zeros_like(e_s) + r[:, None], -e_t) * (gl.zeros_like(e_s) + g[:, None])).to(dtype)
        y = ring_s.index(slot).reshape([N, D])
        if (turned == 0) | (turned >= full):
            if SEGMENTS:
                # Both warpgroups do it: neither needs to wait for the other then.
                _clear_padding(y, segments + fresh, key_start, seq_len)
            w = _without_invisible(
                w, weights.index(HALF + fresh), segments + fresh, start + fresh, key_start, seq_len, keys_end,
                SEGMENTS, VISIT,
            )  # fmt: skip
        # The rows' gradient takes the weights from registers, while they are on their way to the other warpgroup.
        acc = warpgroup_mma(gl.convert_layout(w, OF_PRODUCT), y, acc, is_async=True)
        # The last gradients on their way out have left the buffers, one of which is the weights'.
        tma.store_wait(0)
        barrier()
        weights.index(HALF).store(w)
        fence_async_shared()
        mbarrier.arrive(weights_ready)
        mbarrier.wait(ready_s.index(following), ((j + 1) // 2) & 1, pred=j + 1 < count)
        x = own_s.index(HALF + fresh).reshape([HALF_ROWS, D])
        y = ring_s.index(following).reshape([N, D])
        s = logits(x, y, none, K)
        mbarrier.wait(weights_ready, j & 1)
        # The rows' gradient is done: there are registers for the keys'.
        acc = warpgroup_mma_wait(1 if K == D else 2, deps=[acc])
        x = weights.index(fresh).slice(HALF * (N // 2), N // 2, dim=1).permute([1, 0])
        y = own_s.index(fresh).reshape([HALF_ROWS, D])
        out = warpgroup_mma(x, y, none_d, use_acc=False, is_async=True)
        x = weights.index(1 + fresh).slice(HALF * (N // 2), N // 2, dim=1).permute([1, 0])
        y = own_s.index(1 + fresh).reshape([HALF_ROWS, D])
        out = warpgroup_mma(x, y, out, is_async=True)
        s = warpgroup_mma_wait(2, deps=[s])
        e_s = gl.exp2(exponent(s, log2_scale, m_s))
        out = warpgroup_mma_wait(0, deps=[out])
        mbarrier.arrive(free_s.index(slot))
        mbarrier.arrive(weights_free)
        first, second = _in_register_order(out)
        stage.index(HALF).reshape([D // 8, 256]).store(first)
        # Both warpgroups are through with these weights: their room takes the other half of the gradient.
        mbarrier.wait(weights_free, j & 1)
        spare = weights.index(HALF)._reinterpret(gl.float32, [1, 1, D // 8, 256], key_grad.layout)
        spare.reshape([D // 8, 256]).store(second)
        _send(key_grad, batch, key_head, key_start // HALF_ROWS + HALF, stage.index(HALF), spare, D)
        mbarrier.wait(ready_t, (j + 1) & 1, pred=j + 1 < count)
        x = own_t.index(HALF + fresh).reshape([HALF_ROWS, D])
        y = ring_t.index(fresh).reshape([N, D])
        t = logits(x, y, none, K)
        t = warpgroup_mma_wait(0, deps=[t])
        mbarrier.arrive(free_t)

    tma.store_wait(0)
    barrier()
    spare = weights.index(HALF)._reinterpret(gl.float32, [1, 1, D // 8, 256], key_grad.layout)
    if VISIT:
        _add_up(acc, grad, batch, head, (start - first_row) // HALF_ROWS, stage.index(HALF), spare)
        tma.store_wait(0)
    elif SELF:
        _add_up(acc, key_grad, batch, key_head, start // HALF_ROWS, stage.index(HALF), spare)
        tma.store_wait(0)
    else:
        factor = softmax_scale
        if NARROW:
            factor = softmax_scale * gl.load(unit)
        rows = start + gl.arange(0, HALF_ROWS, gl.SliceLayout(1, mma_d))
        columns = gl.arange(0, D, gl.SliceLayout(0, mma_d))
        place = (batch * heads + head).to(gl.int64) * seq_len + rows
        pointers = grad + place[:, None] * channels + columns[None, :]
        inside = (rows < seq_len)[:, None] & (columns < channels)[None, :]
        gl.store(pointers, (acc * factor).to(dtype), mask=inside)


@gluon.jit(do_not_specialize=["heads", "group", "seq_len", "first_row", "keys_end", "whole", "parts"])
def backward_kernel(
    q_s, k_s, q_t, k_t, segments, bounds, pivot_s, pivot_t, sum_s, sum_t, row_grad, unit, key_grad, grad,
    heads, group, seq_len, first_row, keys_end, whole, parts, channels, log2_scale, softmax_scale,
    N: gl.constexpr, D: gl.constexpr, K: gl.constexpr, SEGMENTS: gl.constexpr, SELF: gl.constexpr, NARROW: gl.constexpr,
    VISIT: gl.constexpr,
):  # fmt: skip
    """Each tile of S once: W = g (Ps - Pt), then W k for the rows and W' q for the keys.

    key_grad is a descriptor of float32 [B, key heads, T / 64 * D / 4, 256] in register order, zero at first, in blocks
    [1, 1, D / 8, 256]: the keys' gradient is added up there, not multiplied by softmax_scale, in no fixed order. With
    SELF the rows' is too; else it goes to grad [B, H, T, channels], finished. With NARROW, row_grad is in units of
    unit[0]. The grid is `tiles.grid`'s.

    In a visit grad is a descriptor like key_grad, of the rows, to which theirs is added; unit is not looked at. The
    grid has one dimension there. Of row tiles in the order of programs, those behind the first `whole` have `parts`
    programs each, which divide their keys. Pivots, first_row, keys_end, whole and parts are for visits only.
    """
    dtype: gl.constexpr = q_s.dtype
    tiles = gl.cdiv(seq_len, ROWS)
    if VISIT:
        own_tiles = tiles - first_row // ROWS
        number = gl.program_id(0)
        number = gl.where(number < whole, number, whole + (number - whole) // parts)
        tile = tiles - 1 - number % own_tiles
        sequence = number // own_tiles
    else:
        tile = tiles - 1 - gl.program_id(1)
        sequence = gl.program_id(2) * gl.num_programs(0) + gl.program_id(0)
    batch = sequence // heads
    head = sequence % heads
    key_head = head // group
    start = tile * ROWS
    segments += batch.to(gl.int64) * seq_len
    last, count, full = span(bounds, tile, tiles, batch, keys_end, N, SEGMENTS, VISIT)
    own = start
    begin = 0
    if VISIT:
        own = start - first_row
        divided = gl.program_id(0) >= whole
        part = gl.where(divided, (gl.program_id(0) - whole) % parts, 0)
        begin = gl.where(divided, count * part // parts, 0)
        count = gl.where(divided, count * (part + 1) // parts, count) - begin

    own_s = gl.allocate_shared_memory(dtype, [2, 1, 1, HALF_ROWS, D], q_s.layout)
    own_t = gl.allocate_shared_memory(dtype, [2, 1, 1, HALF_ROWS, D], q_t.layout)
    ring_s = gl.allocate_shared_memory(dtype, [2, 1, 1, N, D], k_s.layout)
    ring_t = gl.allocate_shared_memory(dtype, [1, 1, 1, N, D], k_t.layout)
    weights_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF_ROWS, N], dtype)
    weights = gl.allocate_shared_memory(dtype, [2, HALF_ROWS, N], weights_layout)
    stage = gl.allocate_shared_memory(gl.float32, [2, 1, 1, D // 8, 256], key_grad.layout)
    own_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    ready_s = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    free_s = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ready_t = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    free_t = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    weights_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    weights_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(ready_s.index(i), count=1)
        mbarrier.init(free_s.index(i), count=2)
    mbarrier.init(own_ready, count=1)
    mbarrier.init(ready_t, count=1)
    mbarrier.init(free_t, count=2)
    mbarrier.init(weights_ready, count=2)
    mbarrier.init(weights_free, count=2)
    fence_async_shared()
    mbarrier.expect(own_ready, 2 * ROWS * D * 2)
    for i in gl.static_range(2):
        tma.async_copy_global_to_shared(q_s, [batch, head, own + i * HALF_ROWS, 0], own_ready, own_s.index(i))
        tma.async_copy_global_to_shared(q_t, [batch, head, own + i * HALF_ROWS, 0], own_ready, own_t.index(i))

    gl.warp_specialize(
        [
            (_backward_rows, (
                segments, pivot_s, pivot_t, sum_s, sum_t, row_grad, unit, key_grad, grad,
                batch, head, heads, key_head, start, last, begin, count, full, seq_len, first_row, keys_end, channels,
                log2_scale, softmax_scale, own_s, own_t, own_ready, ring_s, ring_t, ready_s, ready_t, free_s, free_t,
                weights, weights_ready, weights_free, stage, 0, N, D, K, SEGMENTS, SELF, NARROW, VISIT,
            )),
            (_backward_rows, (
                segments, pivot_s, pivot_t, sum_s, sum_t, row_grad, unit, key_grad, grad,
                batch, head, heads, key_head, start, last, begin, count, full, seq_len, first_row, keys_end, channels,
                log2_scale, softmax_scale, own_s, own_t, own_ready, ring_s, ring_t, ready_s, ready_t, free_s, free_t,
                weights, weights_ready, weights_free, stage, 1, N, D, K, SEGMENTS, SELF, NARROW, VISIT,
            )),
            (_backward_fetch, (
                k_s, k_t, batch, key_head, tile, last, begin, count, ring_s, ring_t, ready_s, ready_t, free_s, free_t,
                N, D, VISIT,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@triton.jit(do_not_specialize=["heads", "tokens"])
def finish_kernel(
    grad, unit, out, heads, tokens, out_strides, factor, channels: tl.constexpr, D: tl.constexpr, NARROW: tl.constexpr
):  # fmt: skip
    """out [B, H, T, channels] = factor * a gradient in register order; with NARROW times unit[0].

    One program for 64 tokens of a head: block + T / 64 * sequence.
    """
    blocks = tl.cdiv(tokens, 64)
    sequence = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    x = tl.load(grad + tl.program_id(0).to(tl.int64) * 64 * D + tl.arange(0, 64 * D))
    if NARROW:
        factor *= tl.load(unit)
    # [half, 8 channels, warp, row, pair, r or r + 8, channel]
    x = (x * factor).reshape([2, D // 16, 4, 8, 4, 2, 2]).permute(2, 5, 3, 0, 1, 4, 6).reshape([64, D])
    rows = block * 64 + tl.arange(0, 64)
    columns = tl.arange(0, D)
    out += (sequence // heads).to(tl.int64) * out_strides[0] + (sequence % heads).to(tl.int64) * out_strides[1]
    pointers = out + rows.to(tl.int64)[:, None] * out_strides[2] + columns[None, :] * out_strides[3]
    tl.store(pointers, x.to(out.dtype.element_ty), mask=(rows < tokens)[:, None] & (columns < channels)[None, :])
