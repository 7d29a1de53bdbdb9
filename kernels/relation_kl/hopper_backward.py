"""The Hopper backward kernel; see hopper_common.py for what it shares with the forward kernel.

Warpgroups that compute logits have 64 rows each, and go through the tiles of keys each at its own pace: products,
exponentials, weights W, and the rows' gradient W x with the weights from registers. They leave the weights in shared
memory, where one more warpgroup makes the keys' gradient W' x of them. None waits but for what it needs: with one
warpgroup's exponentials beside another's products neither of these units is left alone.
"""

# What the decorators make of these functions is not what pyright reads.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma_wait

from .hopper_backward_fetch import (
    BATCH,
    BEGIN,
    COUNT,
    FIELDS,
    KEY_HEAD,
    LAST,
    LO,
    LO_FULL,
    SEQUENCE,
    TILE,
    fetch_row_tiles,
    field,
    received,
    turned,
)
from .hopper_common import (
    BLOCK,
    barrier,
    clear_padding,
    exponent,
    logits,
    names_of,
    next_slot,
    own_logits,
    seen,
    visible_pairs,
)
from .hopper_gradient import gradient_product, send, send_through, set_to_zero, wait_for, zero_gradient
from .segment_kernels import ALIKE, GENERAL, PADDED

_INTEGERS = [
    *("heads", "group", "together", "own_tiles", "items", "most", "sequences"),
    *("seq_len", "first_row", "keys_end", "whole", "parts"),
]


@gluon.jit
def _vectors(buffers, number):
    """Those in a buffer of rows or keys, [tokens, D]."""
    return buffers.index(number).reshape([buffers.shape[3], buffers.shape[4]])


@gluon.jit
def _load_for_rows(x, given, PART: gl.constexpr, PARTS: gl.constexpr, SEGMENTS: gl.constexpr, VISIT: gl.constexpr):
    """What is loaded of a warpgroup's rows of a row tile, x: their first keys and segments, sums, upstream gradient and
    pivots. None is looked at here, so none is waited for."""
    segments, starts, pivot_s, pivot_t, sum_s, sum_t, row_grad, seq_len, first_row = given
    OF_ROWS: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16]))
    rows = first_row + (field(x, TILE) * PARTS + PART) * BLOCK + gl.arange(0, BLOCK, OF_ROWS)
    inside = (rows < seq_len) & (field(x, COUNT) > 0)
    first_keys = rows
    names = rows
    if SEGMENTS:
        before = field(x, BATCH).to(gl.int64) * seq_len
        first_keys = gl.load(starts + before + rows, mask=inside, other=seq_len)
        names = names_of(segments + before, rows, seq_len, field(x, LO + PART) % BLOCK == ALIKE)
    place = field(x, SEQUENCE).to(gl.int64) * (seq_len - first_row) + rows - first_row
    l_s = gl.load(sum_s + place, mask=inside, other=1.0)
    l_t = gl.load(sum_t + place, mask=inside, other=1.0)
    g = gl.load(row_grad + place, mask=inside, other=0.0)
    m_s = l_s
    m_t = l_t
    if VISIT:
        m_s = gl.load(pivot_s + place, mask=inside, other=0.0)
        m_t = gl.load(pivot_t + place, mask=inside, other=0.0)
    return first_keys, names, l_s, l_t, g, m_s, m_t


@gluon.jit
def _rows_gradient(
    given, PART: gl.constexpr, PARTS: gl.constexpr, channels: gl.constexpr, K: gl.constexpr, SLOTS: gl.constexpr,
    SEGMENTS: gl.constexpr, SELF: gl.constexpr, NARROW: gl.constexpr, VISIT: gl.constexpr,
):  # fmt: skip
    """64 rows of each row tile: their weights, and their gradient."""
    (
        segments, starts, bounds, pivot_s, pivot_t, sum_s, sum_t, row_grad, unit, key_grad, grad,
        heads, seq_len, first_row, keys_end, log2_scale, softmax_scale, box, posted, taken,
        own, own_ready, ring, ready, free, weights, weights_ready, weights_free, stage,
    ) = given  # fmt: skip
    dtype: gl.constexpr = ring.dtype
    D: gl.constexpr = ring.shape[4]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    OF_ROWS: gl.constexpr = gl.SliceLayout(1, mma)
    OF_KEYS: gl.constexpr = gl.SliceLayout(0, mma)
    none = gl.zeros([BLOCK, BLOCK], gl.float32, mma)
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    done = gl.to_tensor(0)
    # What belongs to the next rows is loaded while the last ones' gradient is sent, if there are registers for it.
    EARLY: gl.constexpr = PARTS == 2 and not VISIT
    loaded = segments, starts, pivot_s, pivot_t, sum_s, sum_t, row_grad, seq_len, first_row
    x = received(box, posted, taken, 0)
    count = field(x, COUNT)
    if EARLY:
        first_keys, own_names, l_s, l_t, g, m_s, m_t = _load_for_rows(x, loaded, PART, PARTS, SEGMENTS, VISIT)
    while count > 0:
        if not EARLY:
            first_keys, own_names, l_s, l_t, g, m_s, m_t = _load_for_rows(x, loaded, PART, PARTS, SEGMENTS, VISIT)
        sequence = field(x, SEQUENCE)
        tile = field(x, TILE)
        last = field(x, LAST)
        begin = field(x, BEGIN)
        batch = field(x, BATCH)
        start = first_row + (tile * PARTS + PART) * BLOCK
        rows = start + gl.arange(0, BLOCK, OF_ROWS)
        # lo and what the rows are, of which lo takes no account: it is a multiple of 64
        lo = gl.to_tensor(0)
        lo_full = gl.to_tensor(0)
        if SEGMENTS:
            lo = field(x, LO + PART)
            lo_full = field(x, LO_FULL + PART)
            live = own_names >= 0
            l_s = gl.where(live, l_s, 1.0)
            l_t = gl.where(live, l_t, 1.0)
            g = gl.where(live, g, 0.0)
            if VISIT:
                m_s = gl.where(live, m_s, 0.0)
                m_t = gl.where(live, m_t, 0.0)
        if not VISIT:  # the own logits are added when they are known
            m_s = -gl.minimum(l_s, 0.0)
            m_t = -gl.minimum(l_t, 0.0)
            l_s = gl.where(l_s > 0, l_s, 1.0)
            l_t = gl.where(l_t > 0, l_t, 1.0)
        # W = g (e_s / l_s - e_t / l_t) = (e_t - e_s r) (-g / l_t): r is 1, and W 0, where student and teacher are
        # equal. The rows carry the signs, for to turn that of e_t takes an instruction an element.
        r = -gl.div_rn(l_t, l_s)
        g = -g / l_t
        acc = zero_gradient(D, K)
        mbarrier.wait(own_ready, done & 1)
        if SEGMENTS:  # noqa: SIM102 - for the compiler, unlike the next
            if lo & 3 == PADDED:
                for i in range(2):
                    names = segments + batch.to(gl.int64) * seq_len
                    clear_padding(_vectors(own, PARTS * i + PART), names, start, seq_len)
                barrier()

        for j in range(count):
            key_start = last - turned(j, tile, begin, count, VISIT) * BLOCK
            # Always 0, which the compiler cannot know: it would keep what can be made anew, such as the operands'
            # 64-bit descriptors, over the whole loop, more than there are registers for.
            fresh = j >> 30
            room = weights.index(PARTS * slot + PART + fresh)
            masked = (key_start == start) | (key_start < lo_full)
            if VISIT:
                masked = masked | (key_start + BLOCK > keys_end)
            of_keys = gl.to_tensor(0)
            if SEGMENTS:  # it comes beside the products
                block = batch * gl.cdiv(seq_len, BLOCK) + key_start // BLOCK
                of_keys = gl.load(bounds + block * 5 + 4, mask=masked, other=0)
            mbarrier.wait(ready.index(slot), phase)
            if (key_start <= start) & (key_start + BLOCK > lo):
                y = _vectors(ring, 2 * slot + fresh)
                s = logits(_vectors(own, PART + fresh), y, none, K)
                t = logits(_vectors(own, PARTS + PART + fresh), _vectors(ring, 2 * slot + 1 + fresh), none, K)
                s, t = warpgroup_mma_wait(0, deps=[s, t])
                if not VISIT:  # noqa: SIM102
                    if key_start == start:
                        rows = start + fresh + gl.arange(0, BLOCK, OF_ROWS)
                        keys = start + fresh + gl.arange(0, BLOCK, OF_KEYS)
                        # Of padding, NaN: all exponentials are 0 then.
                        m_s = gl.minimum(own_logits(s, rows, keys, log2_scale) + m_s, 1e30)
                        m_t = gl.minimum(own_logits(t, rows, keys, log2_scale) + m_t, 1e30)
                e_s = gl.exp2(exponent(s, log2_scale, m_s))
                e_t = gl.exp2(exponent(t, log2_scale, m_t))
                w = (gl.fma(e_s, gl.zeros_like(e_s) + r[:, None], e_t) * (gl.zeros_like(e_s) + g[:, None])).to(dtype)
                mbarrier.wait(weights_free.index(slot), phase ^ 1)
                if masked:
                    names = segments + (batch + fresh).to(gl.int64) * seq_len
                    if SEGMENTS:  # noqa: SIM102
                        if of_keys & 3 == PADDED:
                            # All warpgroups do it: none needs to wait for another then.
                            clear_padding(y, names, key_start, seq_len)
                    rows = start + fresh + gl.arange(0, BLOCK, OF_ROWS)
                    keys = key_start + gl.arange(0, BLOCK, OF_KEYS)
                    if SEGMENTS and lo & GENERAL != 0:
                        visible = visible_pairs(names, rows, keys, seq_len, keys_end, False, True, VISIT)
                    else:
                        ends = gl.minimum(rows, keys_end - 1) if VISIT else rows
                        visible = seen(first_keys + fresh, ends, keys, SEGMENTS)
                    w = gl.where(visible, w, gl.zeros_like(w))
                # The rows' gradient takes the weights from registers, while they are on their way to shared memory.
                acc = gradient_product(w, y, acc, K, True)
                room.store(w)
                fence_async_shared()
                mbarrier.arrive(weights_ready.index(slot))
                acc = wait_for(acc, 0)
            else:
                mbarrier.wait(weights_free.index(slot), phase ^ 1)
                room.store(gl.zeros([BLOCK, BLOCK], dtype, mma))
                fence_async_shared()
                mbarrier.arrive(weights_ready.index(slot))
            mbarrier.arrive(free.index(slot))
            slot, phase = next_slot(slot, phase, SLOTS)

        done += 1
        count = gl.to_tensor(0)
        if not VISIT:  # in which there is one row tile
            x = received(box, posted, taken, done & 1)
            count = field(x, COUNT)
        if EARLY:
            first_keys, own_names, l_s, l_t, g, m_s, m_t = _load_for_rows(x, loaded, PART, PARTS, SEGMENTS, VISIT)
        head = sequence - batch * heads
        if VISIT:
            send_through(acc, grad, batch, head, (start - first_row) // BLOCK, stage.index(PART))
        elif SELF:
            send_through(acc, key_grad, batch, head, start // BLOCK, stage.index(PART))
        else:
            factor = softmax_scale
            if NARROW:
                factor = softmax_scale * gl.load(unit)
            for i in gl.static_range(len(acc)):
                part = acc[i]
                rows = start + gl.arange(0, BLOCK, gl.SliceLayout(1, part.type.layout))
                columns = i * (D // 2) + gl.arange(0, part.shape[1], gl.SliceLayout(0, part.type.layout))
                pointers = grad + (sequence.to(gl.int64) * seq_len + rows)[:, None] * channels + columns[None, :]
                inside = (rows < seq_len)[:, None] & (columns < channels)[None, :]
                gl.store(pointers, (part * factor).to(dtype), mask=inside)
    tma.store_wait(0)


@gluon.jit
def _keys_gradient(
    given, PARTS: gl.constexpr, K: gl.constexpr, SLOTS: gl.constexpr, STAGES: gl.constexpr, VISIT: gl.constexpr
):  # fmt: skip
    """Of each tile of keys what all rows of the row tile add to its gradient."""
    (
        key_grad, box, posted, taken, own, own_ready, weights, weights_ready, weights_free, stage,
    ) = given  # fmt: skip
    no_gradient = zero_gradient(own.shape[4], K)
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    side = gl.to_tensor(0)
    done = gl.to_tensor(0)
    x = received(box, posted, taken, 0)
    count = field(x, COUNT)
    while count > 0:
        tile = field(x, TILE)
        last = field(x, LAST)
        begin = field(x, BEGIN)
        batch = field(x, BATCH)
        key_head = field(x, KEY_HEAD)
        mbarrier.wait(own_ready, done & 1)
        for j in range(count):
            key_start = last - turned(j, tile, begin, count, VISIT) * BLOCK
            fresh = j >> 30
            mbarrier.wait(weights_ready.index(slot), phase)
            out = no_gradient
            for i in gl.static_range(PARTS):
                w = weights.index(PARTS * slot + i + fresh).permute([1, 0])
                out = gradient_product(w, _vectors(own, i + fresh), out, K, i > 0)
            tma.store_wait(2 * STAGES - 2)  # beside the products
            barrier()
            out = wait_for(out, 0)
            mbarrier.arrive(weights_free.index(slot))
            block = key_start // BLOCK
            rooms = stage.index(2 * side), stage.index(2 * side + 1)
            send(out, key_grad, batch, key_head, block, rooms[0], rooms[1])
            side = (side + 1) % STAGES
            slot, phase = next_slot(slot, phase, SLOTS)
        done += 1
        count = gl.to_tensor(0)
        if not VISIT:  # in which there is one row tile
            x = received(box, posted, taken, done & 1)
            count = field(x, COUNT)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=_INTEGERS)
def backward_kernel(
    q_s, k_s, q_t, k_t, segments, starts, bounds, pivot_s, pivot_t, sum_s, sum_t, row_grad, unit, key_grad, grad,
    key_sums, progress, heads, group, together, own_tiles, items, most, sequences, seq_len, first_row, keys_end, whole,
    parts, log2_scale, softmax_scale, channels: gl.constexpr,
    D: gl.constexpr, K: gl.constexpr, PARTS: gl.constexpr, SLOTS: gl.constexpr, STAGES: gl.constexpr,
    SEGMENTS: gl.constexpr, SELF: gl.constexpr, NARROW: gl.constexpr, VISIT: gl.constexpr,
):  # fmt: skip
    """Each tile of S once: W = g (Ps - Pt), then W k for the rows and W' q for the keys.

    segments are ids, and starts and bounds from `segment_kernels.starts_and_bounds` of tiles of 64 rows and 64 keys.

    key_grad is a descriptor of float32 [B, key heads, T / 64, K / 4, 256] in register order in blocks
    [1, 1, 1, D / 8, 256]; its memory, key_sums, may hold anything at first. The keys' gradient is added up there, not
    multiplied by softmax_scale, in no fixed order. With SELF the rows' is too; else it goes to grad [B, H, T,
    channels], finished (channels is a constant because Triton 3.7 would spill some more without). With NARROW, row_grad
    is in units of unit[0].

    Programs do `items` pieces of work between them: when through with one, each takes the next by progress[0], up to
    `most` of them; together they must be able to take all. A piece is one of a sequence's own_tiles row tiles, of
    64 * PARTS rows, in the order of `tiles.grid`, whose first number is `together`.

    progress, int32 [2 + sequences], is 0 at first: how many pieces have been taken; how many tiles of key_sums have
    been taken to be set to 0; and how many of each of the `sequences`, B times key heads, are 0 by now.

    In a visit each program does the piece of its own number, and key_grad is added to, and nothing set to 0: progress,
    most and sequences are not looked at, nor is unit. grad is a descriptor like key_grad, of the rows, to which theirs
    is added. Of the row tiles, in order, those behind the first `whole` are `parts` pieces each, which divide their
    keys. Pivots, first_row, keys_end, whole and parts are for visits only.

    PARTS, SLOTS and STAGES are parts, tile_slots and grad_slots of `tiles.Pipeline`.
    """
    dtype: gl.constexpr = q_s.dtype
    # The student's rows, and the teacher's; and of each tile of keys the same.
    own = gl.allocate_shared_memory(dtype, [2 * PARTS, 1, 1, BLOCK, D], q_s.layout)
    ring = gl.allocate_shared_memory(dtype, [2 * SLOTS, 1, 1, BLOCK, D], k_s.layout)
    weights_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK, BLOCK], dtype)
    weights = gl.allocate_shared_memory(dtype, [PARTS * SLOTS, BLOCK, BLOCK], weights_layout)
    of_keys = gl.allocate_shared_memory(gl.float32, [2 * STAGES, 1, 1, 1, D // 8, 256], key_grad.layout)
    of_rows = gl.allocate_shared_memory(gl.float32, [PARTS, 1, 1, 1, D // 8, 256], key_grad.layout)
    box = gl.allocate_shared_memory(gl.int32, [FIELDS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    posted = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    own_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    weights_ready = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    weights_free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    mbarrier.init(posted, count=1)
    mbarrier.init(taken, count=PARTS + 1)
    mbarrier.init(own_ready, count=1)
    for i in gl.static_range(SLOTS):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=PARTS)
        mbarrier.init(weights_ready.index(i), count=PARTS)
        mbarrier.init(weights_free.index(i), count=1)
    fence_async_shared()
    of_a_part = (
        segments, starts, bounds, pivot_s, pivot_t, sum_s, sum_t, row_grad, unit, key_grad, grad,
        heads, seq_len, first_row, keys_end, log2_scale, softmax_scale, box, posted, taken,
        own, own_ready, ring, ready, free, weights, weights_ready, weights_free, of_rows,
    )  # fmt: skip
    of_keys_part = (
        key_grad, box, posted, taken, own, own_ready, weights, weights_ready, weights_free, of_keys,
    )  # fmt: skip
    of_fetching = (
        q_s, k_s, q_t, k_t, bounds, progress, heads, group, together, own_tiles, items, most, seq_len, first_row,
        keys_end, whole, parts, box, posted, taken, own, own_ready, weights_ready, weights_free, ring, ready, free,
    )  # fmt: skip
    # All of a multiprocessor's registers, among warps by fours
    if PARTS == 2:
        gl.warp_specialize(
            [
                (_rows_gradient, (of_a_part, 0, PARTS, channels, K, SLOTS, SEGMENTS, SELF, NARROW, VISIT)),
                (_rows_gradient, (of_a_part, 1, PARTS, channels, K, SLOTS, SEGMENTS, SELF, NARROW, VISIT)),
                (_keys_gradient, (of_keys_part, PARTS, K, SLOTS, STAGES, VISIT)),
                (fetch_row_tiles, (of_fetching, PARTS, SLOTS, SEGMENTS, VISIT)),
                (set_to_zero, (key_sums, progress, sequences, gl.cdiv(seq_len, 2 * BLOCK), seq_len, K, VISIT, 2)),
            ],
            [4, 4, 1, 2],
            [184, 120, 24, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_rows_gradient, (of_a_part, 0, PARTS, channels, K, SLOTS, SEGMENTS, SELF, NARROW, VISIT)),
                (_rows_gradient, (of_a_part, 1, PARTS, channels, K, SLOTS, SEGMENTS, SELF, NARROW, VISIT)),
                (_rows_gradient, (of_a_part, 2, PARTS, channels, K, SLOTS, SEGMENTS, SELF, NARROW, VISIT)),
                (_keys_gradient, (of_keys_part, PARTS, K, SLOTS, STAGES, VISIT)),
                (fetch_row_tiles, (of_fetching, PARTS, SLOTS, SEGMENTS, VISIT)),
                (set_to_zero, (key_sums, progress, sequences, gl.cdiv(seq_len, 2 * BLOCK), seq_len, K, VISIT, 2)),
            ],
            [4, 4, 4, 1, 2],
            [128, 128, 72, 24, 24],
        )
