"""The Hopper forward kernel for 129 to 256 channels; see hopper_common.py for what it shares with the others.

128 rows of student and of teacher take 128 KiB of shared memory. In the 96 that are left, tiles of keys come in parts,
some of their channels at a time: so they can be of 128 keys, for which products read the rows half as often as for 64.
Here the tensor cores take longer than the exponentials: there is time for a running maximum, and the statistics are
those of the general kernels.
"""

# What the decorators make of these functions is not what pyright reads.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_common import BLOCK, MASKED, ROWS, bounds_of, exponent, last_keys, names_of, span, visible_pairs
from .hopper_forward import next_slot, partial_sum
from .segment_kernels import ALIKE

_LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _rise(x, m, visible, scale, MASK: gl.constexpr):
    """Logits relative to the row's running maximum after this tile, that maximum, by how much the old one is below it
    (0 or less), and 2 to the power of that."""
    z = x * scale
    if MASK:
        z = gl.where(visible, z, MASKED)
    risen = gl.maximum(m, gl.max(z, 1))
    z = exponent(x, scale, risen)
    if MASK:
        z = gl.where(visible, z, MASKED)
    fall = m - risen
    return z, risen, fall, gl.exp2(fall)


@gluon.jit
def _shrink(total, factor, more):
    """total * factor + more, for sums by row and thread."""
    factor = gl.convert_layout(factor, gl.SliceLayout(1, total.type.layout))
    return gl.fma(total, gl.broadcast(total, factor[:, None])[1], more)


@gluon.jit
def _add_student(s, m_s, l_s, visible, scale, MASK: gl.constexpr):
    """The student's share in the sums of README.md, from its products s of one tile."""
    z_s, m_s, fall_s, factor = _rise(s, m_s, visible, scale, MASK)
    return z_s, m_s, fall_s, _shrink(l_s, factor, partial_sum(gl.exp2(z_s)))


@gluon.jit
def _add_teacher(t, z_s, fall_s, m_t, l_t, a, visible, scale, MASK: gl.constexpr):
    """The teacher's, which comes after it."""
    z_t, m_t, fall_t, factor = _rise(t, m_t, visible, scale, MASK)
    p_t = gl.exp2(z_t)
    # Every old z_t - z_s becomes larger by this.
    change = gl.convert_layout(fall_t - fall_s, gl.SliceLayout(1, a.type.layout))
    a = _shrink(a + l_t * change[:, None], factor, partial_sum(p_t * (z_t - z_s)))
    return m_t, _shrink(l_t, factor, partial_sum(p_t)), a


@gluon.jit
def _fetch_parts(
    k_s, k_t, batch, key_head, last, count, ring, ready, free,
    N: gl.constexpr, D: gl.constexpr, C: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Fetch the tiles of keys, C channels at a time, the student's and the teacher's in turn."""
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(1)
    for j in range(count):
        for part in gl.static_range(2 * (D // C)):
            mbarrier.wait(free.index(slot), phase)
            mbarrier.expect(ready.index(slot), N * C * 2)
            at = [batch, key_head, last - j * N, part % (D // C) * C]
            keys = k_s if part < D // C else k_t
            tma.async_copy_global_to_shared(keys, at, ready.index(slot), ring.index(slot))
            slot, phase = next_slot(slot, phase, SLOTS)


@gluon.jit
def _product(x, buffer, s, PART: gl.constexpr, N: gl.constexpr, C: gl.constexpr, K: gl.constexpr):
    """Issue what channels [PART * C, PART * C + C) add to the logits s, of which those from K on are 0."""
    WIDTH: gl.constexpr = min(C, K - PART * C)
    y = buffer.reshape([N, C])
    if WIDTH < C:
        y = y.slice(0, WIDTH, dim=1)
    if x.shape[1] > WIDTH:
        x = x.slice(PART * C, WIDTH, dim=1)
    return warpgroup_mma(x, y.permute([1, 0]), s, use_acc=PART > 0, is_async=True)


@gluon.jit
def _masked_tiles(
    first, end, count, s, slot, phase, m_s, m_t, l_s, l_t, a,
    segments, rows, last, seq_len, alike, scale, x_s, x_t, none, ring, ready, free,
    N: gl.constexpr, C: gl.constexpr, PARTS: gl.constexpr, K: gl.constexpr, SLOTS: gl.constexpr,
    SEGMENTS: gl.constexpr,
):  # fmt: skip
    """The tiles [first, end) of `count`, with a mask. There are few: nothing runs beside their products. s is the
    student's product of the first one, and then of tile `end`."""
    for j in range(first, end):
        keys = last - j * N + gl.arange(0, N, gl.SliceLayout(0, none.type.layout))
        visible = visible_pairs(segments, rows, keys, seq_len, seq_len, alike, SEGMENTS, False)
        t = none
        begin = slot
        for part in gl.static_range(PARTS):
            mbarrier.wait(ready.index(slot), phase)
            t = _product(x_t, ring.index(slot), t, part, N, C, K)
            slot, phase = next_slot(slot, phase, SLOTS)
        t = warpgroup_mma_wait(0, deps=[t])
        for part in gl.static_range(PARTS):
            mbarrier.arrive(free.index((begin + part) % SLOTS))
        z_s, m_s, fall_s, l_s = _add_student(s, m_s, l_s, visible, scale, True)
        m_t, l_t, a = _add_teacher(t, z_s, fall_s, m_t, l_t, a, visible, scale, True)
        begin = slot
        for part in gl.static_range(PARTS):
            mbarrier.wait(ready.index(slot), phase, pred=j + 1 < count)
            s = _product(x_s, ring.index(slot), s, part, N, C, K)
            slot, phase = next_slot(slot, phase, SLOTS)
        s = warpgroup_mma_wait(0, deps=[s])
        for part in gl.static_range(PARTS):
            mbarrier.arrive(free.index((begin + part) % SLOTS), pred=j + 1 < count)
    return s, slot, phase, m_s, m_t, l_s, l_t, a


@gluon.jit
def _forward_rows(
    segments, kl, max_s, max_t, inverse_s, inverse_t, sequence, start, last, count, full, seq_len, kind, scale,
    own_s, own_t, own_ready, ring, ready, free,
    HALF: gl.constexpr, N: gl.constexpr, D: gl.constexpr, C: gl.constexpr, K: gl.constexpr, SLOTS: gl.constexpr,
    SEGMENTS: gl.constexpr,
):  # fmt: skip
    """64 rows. The first tiles of keys are those of the row tile itself."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    OF_ROWS: gl.constexpr = gl.SliceLayout(1, mma)
    OWN_TILES: gl.constexpr = ROWS // N
    PARTS: gl.constexpr = D // C
    # Parts of the next student's product for which there are buffers beside the teacher's.
    EARLY: gl.constexpr = min(SLOTS - PARTS, PARTS)
    x_s = own_s.index(HALF).reshape([BLOCK, D])
    x_t = own_t.index(HALF).reshape([BLOCK, D])
    rows = start + HALF * BLOCK + gl.arange(0, BLOCK, OF_ROWS)
    none = gl.zeros([BLOCK, N], gl.float32, mma)
    m_s = gl.full([BLOCK], MASKED, gl.float32, OF_ROWS)
    m_t = gl.full([BLOCK], MASKED, gl.float32, OF_ROWS)
    l_s = partial_sum(none)
    l_t = partial_sum(none)
    a = partial_sum(none)
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)

    # The student's product is one tile ahead. After the last tile it is taken of what the buffers hold, and not used.
    mbarrier.wait(own_ready, 0)
    s = none
    for part in gl.static_range(PARTS):
        mbarrier.wait(ready.index(slot), phase)
        s = _product(x_s, ring.index(slot), s, part, N, C, K)
        slot, phase = next_slot(slot, phase, SLOTS)
    s = warpgroup_mma_wait(0, deps=[s])
    for part in gl.static_range(PARTS):
        mbarrier.arrive(free.index(part))
    s, slot, phase, m_s, m_t, l_s, l_t, a = _masked_tiles(
        0, OWN_TILES, count, s, slot, phase, m_s, m_t, l_s, l_t, a,
        segments, rows, last, seq_len, kind == ALIKE, scale, x_s, x_t, none, ring, ready, free,
        N, C, PARTS, K, SLOTS, SEGMENTS,
    )  # fmt: skip
    for j in range(OWN_TILES, full):
        t = none
        begin = slot
        for part in gl.static_range(PARTS):
            mbarrier.wait(ready.index(slot), phase)
            t = _product(x_t, ring.index(slot), t, part, N, C, K)
            slot, phase = next_slot(slot, phase, SLOTS)
        # beside the teacher's product
        z_s, m_s, fall_s, l_s = _add_student(s, m_s, l_s, None, scale, False)
        following = slot
        for part in gl.static_range(EARLY):
            mbarrier.wait(ready.index(slot), phase, pred=j + 1 < count)
            s = _product(x_s, ring.index(slot), s, part, N, C, K)
            slot, phase = next_slot(slot, phase, SLOTS)
        for part in gl.static_range(PARTS):
            t = warpgroup_mma_wait(EARLY + PARTS - 1 - part, deps=[t])
            mbarrier.arrive(free.index((begin + part) % SLOTS))
        # beside the student's next product
        m_t, l_t, a = _add_teacher(t, z_s, fall_s, m_t, l_t, a, None, scale, False)
        for part in gl.static_range(EARLY, PARTS):
            mbarrier.wait(ready.index(slot), phase, pred=j + 1 < count)
            s = _product(x_s, ring.index(slot), s, part, N, C, K)
            slot, phase = next_slot(slot, phase, SLOTS)
        s = warpgroup_mma_wait(0, deps=[s])
        for part in gl.static_range(PARTS):
            mbarrier.arrive(free.index((following + part) % SLOTS), pred=j + 1 < count)
    if SEGMENTS:
        s, slot, phase, m_s, m_t, l_s, l_t, a = _masked_tiles(
            full, count, count, s, slot, phase, m_s, m_t, l_s, l_t, a,
            segments, rows, last, seq_len, False, scale, x_s, x_t, none, ring, ready, free,
            N, C, PARTS, K, SLOTS, SEGMENTS,
        )  # fmt: skip

    l_s = gl.convert_layout(gl.sum(l_s, 1), OF_ROWS)
    l_t = gl.convert_layout(gl.sum(l_t, 1), OF_ROWS)
    a = gl.convert_layout(gl.sum(a, 1), OF_ROWS)
    inside = rows < seq_len
    live = inside
    if SEGMENTS:
        live = names_of(segments, rows, seq_len, kind == ALIKE) >= 0
    place = sequence.to(gl.int64) * seq_len + rows
    value = (a / l_t - (gl.log2(l_t) - gl.log2(l_s))) * _LN2
    gl.store(kl + place, gl.where(live, value, 0.0), mask=inside)
    gl.store(max_s + place, gl.where(live, m_s, 0.0), mask=inside)
    gl.store(max_t + place, gl.where(live, m_t, 0.0), mask=inside)
    gl.store(inverse_s + place, gl.where(live, 1.0 / l_s, 0.0), mask=inside)
    gl.store(inverse_t + place, gl.where(live, 1.0 / l_t, 0.0), mask=inside)


@gluon.jit(do_not_specialize=["heads", "group", "seq_len"])
def wide_forward_kernel(
    q_s, k_s, q_t, k_t, segments, bounds, kl, max_s, max_t, inverse_s, inverse_t, heads, group, seq_len, log2_scale,
    N: gl.constexpr, D: gl.constexpr, C: gl.constexpr, K: gl.constexpr, SLOTS: gl.constexpr, SEGMENTS: gl.constexpr,
):  # fmt: skip
    """Rows of the divergence, maxima of the logits and 1 / sums of the exponentials, in one pass over the keys.

    q and k are descriptors of [B, H, T, channels] in blocks [1, 1, 64, D] and [1, 1, N, C], of which K channels are
    used; kl and the statistics float32 [B, H, T], as from `triton_kernels.forward_kernel`; bounds from
    `segment_kernels.tile_bounds(ids, 128, N)`. The grid is `tiles.grid`'s.
    """
    dtype: gl.constexpr = q_s.dtype
    tiles = gl.cdiv(seq_len, ROWS)
    # The last row tiles have the most keys: they go first, so that none is left running alone at the end.
    tile = tiles - 1 - gl.program_id(1)
    sequence = gl.program_id(2) * gl.num_programs(0) + gl.program_id(0)
    batch = sequence // heads
    head = sequence % heads
    start = tile * ROWS
    segments += batch.to(gl.int64) * seq_len
    last = last_keys(tile, seq_len, N, False)
    lo, lo_full, kind = bounds_of(bounds + (batch * tiles + tile) * 5, SEGMENTS)
    count, full = span(last, lo, lo_full, N, False)

    own_s = gl.allocate_shared_memory(dtype, [2, 1, 1, BLOCK, D], q_s.layout)
    own_t = gl.allocate_shared_memory(dtype, [2, 1, 1, BLOCK, D], q_t.layout)
    ring = gl.allocate_shared_memory(dtype, [SLOTS, 1, 1, N, C], k_s.layout)
    own_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    mbarrier.init(own_ready, count=1)
    for i in gl.static_range(SLOTS):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    fence_async_shared()
    mbarrier.expect(own_ready, 2 * ROWS * D * 2)
    for i in gl.static_range(2):
        tma.async_copy_global_to_shared(q_s, [batch, head, start + i * BLOCK, 0], own_ready, own_s.index(i))
        tma.async_copy_global_to_shared(q_t, [batch, head, start + i * BLOCK, 0], own_ready, own_t.index(i))

    gl.warp_specialize(
        [
            (_forward_rows, (
                segments, kl, max_s, max_t, inverse_s, inverse_t, sequence, start, last, count, full, seq_len, kind,
                log2_scale, own_s, own_t, own_ready, ring, ready, free, 0, N, D, C, K, SLOTS, SEGMENTS,
            )),
            (_forward_rows, (
                segments, kl, max_s, max_t, inverse_s, inverse_t, sequence, start, last, count, full, seq_len, kind,
                log2_scale, own_s, own_t, own_ready, ring, ready, free, 1, N, D, C, K, SLOTS, SEGMENTS,
            )),
            (_fetch_parts, (k_s, k_t, batch, head // group, last, count, ring, ready, free, N, D, C, SLOTS)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
