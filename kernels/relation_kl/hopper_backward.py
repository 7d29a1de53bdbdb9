"""The Hopper backward kernel; see hopper_common.py for what it shares with the forward kernel."""

# What the decorators make of these functions is not what pyright reads.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from .hopper_backward_fetch import fetch_row_tiles, turned
from .hopper_common import (
    HALF_ROWS,
    ROWS,
    barrier,
    clear_padding,
    exponent,
    logits,
    names_of,
    own_logits,
    receive,
    seen,
    visible_pairs,
)
from .hopper_gradient import (
    add_up,
    gradient_product,
    in_register_order,
    put,
    send,
    set_to_zero,
    wait_for,
    zero_gradient,
)
from .segment_kernels import ALIKE, GENERAL, PADDED

_INTEGERS = [
    *("heads", "group", "together", "own_tiles", "items", "most", "sequences"),
    *("seq_len", "first_row", "keys_end", "whole", "parts"),
]


@gluon.constexpr_function
def _ahead(D):
    """Whether both products of the next tile are issued as soon as the weights are stored, and weights lie in two
    buffers by turns, the gradient in none of them: up to 64 channels there are registers and shared memory for it."""
    return D <= 64


@gluon.jit
def _without_invisible(
    w, room, segments, row_start, key_start, seq_len, keys_end, SEGMENTS: gl.constexpr, VISIT: gl.constexpr
):  # fmt: skip
    """The weights w [64, N] with those of invisible pairs set to 0, in shared memory (room): with masks of ids in
    registers ptxas spills others in the loop around it, and with any, without SEGMENTS, its order there is slower."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    tma.store_wait(0)  # what lay there before is on its way
    barrier()
    room.store(w)
    barrier()
    rows = row_start + gl.arange(0, w.shape[0], gl.SliceLayout(1, LAYOUT))
    keys = key_start + gl.arange(0, w.shape[1], gl.SliceLayout(0, LAYOUT))
    visible = visible_pairs(segments, rows, keys, seq_len, keys_end, False, SEGMENTS, VISIT)
    x = room.load(LAYOUT)
    room.store(gl.where(visible, x, gl.zeros_like(x)))
    barrier()
    return room.load(w.type.layout)


@gluon.jit
def _vectors(buffers, number):
    """Those in a buffer of rows or keys, [tokens, D]."""
    return buffers.index(number).reshape([buffers.shape[3], buffers.shape[4]])


@gluon.jit
def _keys_product(weights, own, at, no_gradient, fresh, HALF: gl.constexpr, N: gl.constexpr, K: gl.constexpr):
    """W' x of 64 keys and both warpgroups' rows: issued."""
    out = no_gradient
    for i in gl.static_range(2):
        w = weights.index(2 * at + i + fresh).slice(HALF * (N // 2), N // 2, dim=1).permute([1, 0])
        out = gradient_product(w, _vectors(own, i + fresh), out, K, i > 0)
    return out


@gluon.jit
def _backward_rows(
    segments, starts, bounds, pivot_s, pivot_t, sum_s, sum_t, row_grad, unit, key_grad, grad,
    heads, seq_len, first_row, keys_end, log2_scale, softmax_scale, box, posted, taken,
    own, own_ready, ring_s, ring_t, ready_s, ready_t, free_s, free_t,
    weights, weights_ready, weights_free, stage,
    HALF: gl.constexpr, channels: gl.constexpr, N: gl.constexpr, D: gl.constexpr, K: gl.constexpr,
    SEGMENTS: gl.constexpr, SELF: gl.constexpr, NARROW: gl.constexpr, VISIT: gl.constexpr,
):  # fmt: skip
    """64 rows of each row tile and, of each tile of keys, 64 keys, for which both warpgroups' weights are needed."""
    dtype: gl.constexpr = ring_s.dtype
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    OF_ROWS: gl.constexpr = gl.SliceLayout(1, mma)
    OF_KEYS: gl.constexpr = gl.SliceLayout(0, mma)
    none = gl.zeros([HALF_ROWS, N], gl.float32, mma)
    no_gradient = zero_gradient(D, K)
    # Products of K channels
    PARTS: gl.constexpr = 1 if K == D else 2
    AHEAD: gl.constexpr = _ahead(D)
    visited = gl.to_tensor(0)
    done = gl.to_tensor(0)
    batch, head, key_head, tile, last, count, full, begin = receive(box, posted, taken, 0)
    while count > 0:
        kind = full & 3  # of the rows, but for GENERAL; the rest is how many tiles of keys need no mask
        tile_start = tile * ROWS
        if not VISIT:
            # The compiler is to see that the rows begin there, for N = ROWS: half of the pairs need no work then.
            last = tile_start + ROWS - N
        names = segments + batch.to(gl.int64) * seq_len
        start = tile_start + HALF * HALF_ROWS
        rows = start + gl.arange(0, HALF_ROWS, OF_ROWS)
        live = rows < seq_len
        first_keys = rows
        if SEGMENTS:
            first_keys = gl.load(starts + batch.to(gl.int64) * seq_len + rows, mask=live, other=seq_len)
            live = names_of(names, rows, seq_len, kind == ALIKE) >= 0
        if VISIT:
            place = (batch * heads + head).to(gl.int64) * (seq_len - first_row) + rows - first_row
        else:
            place = (batch * heads + head).to(gl.int64) * seq_len + rows
        l_s = gl.load(sum_s + place, mask=live, other=1.0)
        l_t = gl.load(sum_t + place, mask=live, other=1.0)
        g = gl.load(row_grad + place, mask=live, other=0.0)
        acc = zero_gradient(D, K)

        # Always 0, which the compiler cannot know; see `fresh`.
        again = done >> 30
        mbarrier.wait(own_ready, done & 1)
        if SEGMENTS:  # noqa: SIM102 - for the compiler, unlike the next
            if kind == PADDED:
                for i in range(2):
                    clear_padding(_vectors(own, 2 * i + HALF), names, start, seq_len)
                barrier()
        slot = visited % 2
        mbarrier.wait(ready_s.index(slot), (visited // 2) & 1)
        s = logits(_vectors(own, HALF + again), _vectors(ring_s, slot), none, K)
        mbarrier.wait(ready_t, visited & 1)
        t = logits(_vectors(own, 2 + HALF + again), _vectors(ring_t, again), none, K)
        s, t = warpgroup_mma_wait(0, deps=[s, t])
        mbarrier.arrive(free_t)
        # W = g (e_s / l_s - e_t / l_t) = (e_t - e_s r) (-g / l_t): r is 1, and W 0, where student and teacher are
        # equal. The rows carry the signs, for to turn that of e_t takes an instruction an element.
        if VISIT:
            m_s = gl.load(pivot_s + place, mask=live, other=0.0)
            m_t = gl.load(pivot_t + place, mask=live, other=0.0)
        else:
            keys = last + gl.arange(0, N, OF_KEYS)
            m_s = gl.where(live, own_logits(s, rows, keys, log2_scale) - gl.minimum(l_s, 0.0), 0.0)
            m_t = gl.where(live, own_logits(t, rows, keys, log2_scale) - gl.minimum(l_t, 0.0), 0.0)
            l_s = gl.where(l_s > 0, l_s, 1.0)
            l_t = gl.where(l_t > 0, l_t, 1.0)
        r = -gl.div_rn(l_t, l_s)
        g = -g / l_t
        e_s = gl.exp2(exponent(s, log2_scale, m_s))
        if AHEAD:  # t is e_t where the loop begins
            t = gl.exp2(exponent(t, log2_scale, m_t))

        for j in range(count):
            place_of_keys = turned(j, tile, begin, count, VISIT)
            key_start = last - place_of_keys * N
            slot = visited % 2
            following = slot ^ 1
            # Always 0, which the compiler cannot know: it would keep the operands' 64-bit descriptors over the whole
            # loop, more than there are registers for, where a few additions make them anew.
            fresh = j >> 30
            e_t = t
            if not AHEAD:
                e_t = gl.exp2(exponent(t, log2_scale, m_t))
            w = (gl.fma(e_s, gl.zeros_like(e_s) + r[:, None], e_t) * (gl.zeros_like(e_s) + g[:, None])).to(dtype)
            y = _vectors(ring_s, slot)
            at = 0
            if AHEAD:
                # Both warpgroups have read the weights of the tile before the last: the other one had before it stored
                # the last tile's, and those this one has waited for.
                at = visited % 2
            if (place_of_keys == 0) | (place_of_keys >= full >> 3):
                if SEGMENTS:
                    of_keys = gl.load(bounds + (batch * gl.cdiv(seq_len, ROWS) + key_start // ROWS) * 5 + 4)
                    if of_keys & 3 == PADDED:
                        # Both warpgroups do it: neither needs to wait for the other then.
                        clear_padding(y, names + fresh, key_start, seq_len)
                if SEGMENTS and full & GENERAL == 0:
                    rows = start + fresh + gl.arange(0, HALF_ROWS, OF_ROWS)
                    keys = key_start + gl.arange(0, N, OF_KEYS)
                    ends = gl.minimum(rows, keys_end - 1) if VISIT else rows
                    w = gl.where(seen(first_keys + fresh, ends, keys, SEGMENTS), w, gl.zeros_like(w))
                else:
                    w = _without_invisible(
                        w, weights.index(2 * at + HALF + fresh), names + fresh, start + fresh, key_start, seq_len,
                        keys_end, SEGMENTS, VISIT,
                    )  # fmt: skip
            # The rows' gradient takes the weights from registers, while they are on their way to the other warpgroup.
            acc = gradient_product(w, y, acc, K, True)
            if not AHEAD:
                # The last gradients on their way out have left the buffers, one of which is the weights'.
                tma.store_wait(0)
                barrier()
            weights.index(2 * at + HALF + fresh).store(w)
            fence_async_shared()
            mbarrier.arrive(weights_ready.index(at))
            mbarrier.wait(ready_s.index(following), ((visited + 1) // 2) & 1, pred=j + 1 < count)
            s = logits(_vectors(own, HALF + fresh), _vectors(ring_s, following), none, K)
            if AHEAD:
                mbarrier.wait(ready_t, (visited + 1) & 1, pred=j + 1 < count)
                t = logits(_vectors(own, 2 + HALF + fresh), _vectors(ring_t, fresh), none, K)
                acc = wait_for(acc, 2)
                s = warpgroup_mma_wait(1, deps=[s])
                e_s = gl.exp2(exponent(s, log2_scale, m_s))
                mbarrier.wait(weights_ready.index(at), (visited // 2) & 1)
            else:
                mbarrier.wait(weights_ready.index(at), visited & 1)
                # The rows' gradient is done: there are registers for the keys'.
                acc = wait_for(acc, PARTS)
            out = _keys_product(weights, own, at, no_gradient, fresh, HALF, N, K)
            if AHEAD:
                t = warpgroup_mma_wait(2, deps=[t])
                mbarrier.arrive(free_t, pred=j + 1 < count)
                t = gl.exp2(exponent(t, log2_scale, m_t))
                out = wait_for(out, 0)
                mbarrier.arrive(free_s.index(slot))
                first, second = in_register_order(out)
                tma.store_wait(0)
                barrier()
                room = stage.index(2 * HALF + fresh)
                spare = stage.index(2 * HALF + 1 + fresh)
                put(first, room)
                put(second, spare)
                send(key_grad, batch, key_head, (key_start + fresh) // HALF_ROWS + HALF, room, spare)
            else:
                s = warpgroup_mma_wait(2 * PARTS, deps=[s])
                e_s = gl.exp2(exponent(s, log2_scale, m_s))
                out = wait_for(out, 0)
                mbarrier.arrive(free_s.index(slot))
                mbarrier.arrive(weights_free)
                first, second = in_register_order(out)
                put(first, stage.index(HALF))
                # Both warpgroups are through with these weights: their room takes the other piece of the gradient.
                mbarrier.wait(weights_free, visited & 1)
                spare = weights.index(HALF)._reinterpret(gl.float32, [1, 1, 1, D // 8, 256], key_grad.layout)
                put(second, spare)
                send(key_grad, batch, key_head, key_start // HALF_ROWS + HALF, stage.index(HALF), spare)
                mbarrier.wait(ready_t, (visited + 1) & 1, pred=j + 1 < count)
                t = logits(_vectors(own, 2 + HALF + fresh), _vectors(ring_t, fresh), none, K)
                t = warpgroup_mma_wait(0, deps=[t])
                mbarrier.arrive(free_t, pred=j + 1 < count)
            visited += 1

        tma.store_wait(0)
        barrier()
        if AHEAD:
            again = visited >> 30
            room = stage.index(2 * HALF + again)
            spare = stage.index(2 * HALF + 1 + again)
        else:
            room = stage.index(HALF)
            spare = weights.index(HALF)._reinterpret(gl.float32, [1, 1, 1, D // 8, 256], key_grad.layout)
        if VISIT:
            add_up(acc, grad, batch, head, (start - first_row) // HALF_ROWS, room, spare)
        elif SELF:
            add_up(acc, key_grad, batch, key_head, start // HALF_ROWS, room, spare)
        else:
            factor = softmax_scale
            if NARROW:
                factor = softmax_scale * gl.load(unit)
            # Always 0, or the compiler would keep where the gradient goes over the whole loop.
            fresh = visited >> 30
            for i in gl.static_range(PARTS):
                x = acc[i]
                rows = start + fresh + gl.arange(0, HALF_ROWS, gl.SliceLayout(1, x.type.layout))
                columns = i * (D // 2) + gl.arange(0, x.shape[1], gl.SliceLayout(0, x.type.layout))
                place = (batch * heads + head + fresh).to(gl.int64) * seq_len + rows
                pointers = grad + place[:, None] * channels + columns[None, :]
                inside = (rows < seq_len)[:, None] & (columns < channels)[None, :]
                gl.store(pointers, (x * factor).to(dtype), mask=inside)
        done += 1
        batch, head, key_head, tile, last, count, full, begin = receive(box, posted, taken, done & 1)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=_INTEGERS)
def backward_kernel(
    q_s, k_s, q_t, k_t, segments, starts, bounds, pivot_s, pivot_t, sum_s, sum_t, row_grad, unit, key_grad, grad,
    key_sums, progress, heads, group, together, own_tiles, items, most, sequences, seq_len, first_row, keys_end, whole,
    parts, log2_scale, softmax_scale, channels: gl.constexpr,
    N: gl.constexpr, D: gl.constexpr, K: gl.constexpr, SEGMENTS: gl.constexpr, SELF: gl.constexpr, NARROW: gl.constexpr,
    VISIT: gl.constexpr,
):  # fmt: skip
    """Each tile of S once: W = g (Ps - Pt), then W k for the rows and W' q for the keys.

    segments are ids, and starts and bounds from `segment_kernels.starts_and_bounds`.

    key_grad is a descriptor of float32 [B, key heads, T / 64, K / 4, 256] in register order in blocks
    [1, 1, 1, D / 8, 256]; its memory, key_sums, may hold anything at first. The keys' gradient is added up there, not
    multiplied by softmax_scale, in no fixed order. With SELF the rows' is too; else it goes to grad [B, H, T,
    channels], finished (channels is a constant because Triton 3.7 would spill some more without). With NARROW, row_grad
    is in units of unit[0].

    Programs do `items` pieces of work between them: when through with one, each takes the next by progress[0], up to
    `most` of them; together they must be able to take all. A piece is one of a sequence's own_tiles row tiles, in the
    order of `tiles.grid`, whose first number is `together`.

    progress, int32 [2 + sequences], is 0 at first: how many pieces have been taken; how many tiles of key_sums have
    been taken to be set to 0; and how many of each of the `sequences`, B times key heads, are 0 by now.

    In a visit each program does the piece of its own number, and key_grad is added to, and nothing set to 0: progress,
    most and sequences are not looked at, nor is unit. grad is a descriptor like key_grad, of the rows, to which theirs
    is added. Of the row tiles, in order, those behind the first `whole` are `parts` pieces each, which divide their
    keys. Pivots, first_row, keys_end, whole and parts are for visits only.

    LLVM, which looks at no more than 32 blocks of code to see whether one leads to another, moves what both warpgroups
    compute first to where the kernel begins once the partitions beside them have more than a few branches. That takes
    registers in the loop that it has not: hence predicates where branches would do, and `wait_zeroed` in one piece.
    """
    dtype: gl.constexpr = q_s.dtype
    # The student's rows, and the teacher's
    own = gl.allocate_shared_memory(dtype, [4, 1, 1, HALF_ROWS, D], q_s.layout)
    ring_s = gl.allocate_shared_memory(dtype, [2, 1, 1, N, D], k_s.layout)
    ring_t = gl.allocate_shared_memory(dtype, [1, 1, 1, N, D], k_t.layout)
    weights_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF_ROWS, N], dtype)
    BUFFERS: gl.constexpr = 2 if _ahead(D) else 1
    weights = gl.allocate_shared_memory(dtype, [2 * BUFFERS, HALF_ROWS, N], weights_layout)
    stage = gl.allocate_shared_memory(gl.float32, [2 * BUFFERS, 1, 1, 1, D // 8, 256], key_grad.layout)
    # Where those who compute find which row tile comes next
    box = gl.allocate_shared_memory(gl.int32, [8], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    posted = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    own_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    ready_s = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    free_s = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ready_t = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    free_t = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    weights_ready = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    weights_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(ready_s.index(i), count=1)
        mbarrier.init(free_s.index(i), count=2)
    mbarrier.init(posted, count=1)
    mbarrier.init(taken, count=2)
    mbarrier.init(own_ready, count=1)
    mbarrier.init(ready_t, count=1)
    mbarrier.init(free_t, count=2)
    for i in gl.static_range(BUFFERS):
        mbarrier.init(weights_ready.index(i), count=2)
    mbarrier.init(weights_free, count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_backward_rows, (
                segments, starts, bounds, pivot_s, pivot_t, sum_s, sum_t, row_grad, unit, key_grad, grad,
                heads, seq_len, first_row, keys_end, log2_scale, softmax_scale, box, posted, taken,
                own, own_ready, ring_s, ring_t, ready_s, ready_t, free_s, free_t,
                weights, weights_ready, weights_free, stage, 0, channels, N, D, K, SEGMENTS, SELF, NARROW, VISIT,
            )),
            (_backward_rows, (
                segments, starts, bounds, pivot_s, pivot_t, sum_s, sum_t, row_grad, unit, key_grad, grad,
                heads, seq_len, first_row, keys_end, log2_scale, softmax_scale, box, posted, taken,
                own, own_ready, ring_s, ring_t, ready_s, ready_t, free_s, free_t,
                weights, weights_ready, weights_free, stage, 1, channels, N, D, K, SEGMENTS, SELF, NARROW, VISIT,
            )),
            (fetch_row_tiles, (
                q_s, k_s, q_t, k_t, bounds, progress, heads, group, together, own_tiles, items, most, seq_len,
                first_row, keys_end, whole, parts, box, posted, taken, own, own_ready, ring_s, ring_t, ready_s, ready_t,
                free_s, free_t, N, D, SEGMENTS, VISIT,
            )),
            (set_to_zero, (key_sums, progress, sequences, own_tiles, seq_len, K, VISIT, 2)),
        ],
        [4, 1, 2],
        [240, 24, 24],
    )  # fmt: skip
