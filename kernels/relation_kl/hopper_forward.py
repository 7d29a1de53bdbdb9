"""The Hopper forward kernel; see hopper_common.py for what it shares with the backward kernel.

Two programs share a multiprocessor: while one waits for products, begins or ends, the other computes.
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
    warpgroup_mma_wait,
)

from .hopper_common import (
    BLOCK,
    MASKED,
    ROWS,
    bounds_of_rows,
    exponent,
    last_keys,
    logits,
    next_slot,
    own_logits,
    seen,
    span,
)
from .segment_kernels import GENERAL

# Registers a thread with which a program begins: two programs, of three warpgroups each, fit a multiprocessor. Later
# those that compute have 112 and 104, and the third, of which one warp fetches and the others do nothing, 24.
REGISTERS = 80
# Sums relative to the own logit that are larger are kept as minus their logarithm.
_LARGE = gl.constexpr(2.0**80)
_LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def partial_sum(x):
    """[R, C] -> [R, 8]: the sums that need no exchange between threads; those are added up once at the end."""
    return gl.sum(x.reshape([x.shape[0], x.shape[1] // 8, 8]), 1)


@gluon.jit
def _relative_sum(total, excess):
    """See `triton_kernels.relative_sum`."""
    relative = total * gl.exp2(excess)
    return gl.where(relative <= _LARGE, relative, -(gl.log2(total) + excess))


@gluon.jit
def _fetch_keys(k, at, slot, phase, ring, ready, free, D: gl.constexpr, SLOTS: gl.constexpr):
    """A tile of keys for the next buffer; returns which one is next then."""
    mbarrier.wait(free.index(slot), phase)
    mbarrier.expect(ready.index(slot), BLOCK * D * 2)
    tma.async_copy_global_to_shared(k, at, ready.index(slot), ring.index(slot))
    return next_slot(slot, phase, SLOTS)


@gluon.jit
def _span(last, lo, lo_full, kind, SEGMENTS: gl.constexpr, VISIT: gl.constexpr):
    """As `span`, of 64 rows; of those that the general kernel does again no more than their own tokens."""
    count, full = span(last, lo, lo_full, BLOCK, VISIT)
    if SEGMENTS:
        count = gl.where(kind & GENERAL != 0, ROWS // BLOCK, gl.maximum(count, 1))
    return count, full


@gluon.jit
def _forward_fetch(
    k_s, k_t, bounds, batch, key_head, tile, last, seq_len, ring, ready, free,
    D: gl.constexpr, SLOTS: gl.constexpr, SEGMENTS: gl.constexpr, VISIT: gl.constexpr,
):  # fmt: skip
    """Fetch the tiles of keys, the student's and the teacher's in turn, in the order in which they are used."""
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(1)
    # The last tile of keys is visited whatever the bounds are. Were they read before, the teacher's would wait too.
    at = [batch, key_head, last, 0]
    slot, phase = _fetch_keys(k_s, at, slot, phase, ring, ready, free, D, SLOTS)
    slot, phase = _fetch_keys(k_t, at, slot, phase, ring, ready, free, D, SLOTS)
    count, _ = span(last, 0, 0, BLOCK, VISIT)
    if SEGMENTS:
        count = 1
        for i in gl.static_range(2):
            lo, lo_full, kind = bounds_of_rows(bounds, batch, 2 * tile + i, gl.cdiv(seq_len, BLOCK))
            of_half, _ = _span(last, lo, lo_full, kind, SEGMENTS, VISIT)
            count = gl.maximum(count, of_half)
    for j in range(1, count):
        at = [batch, key_head, last - j * BLOCK, 0]
        slot, phase = _fetch_keys(k_s, at, slot, phase, ring, ready, free, D, SLOTS)
        slot, phase = _fetch_keys(k_t, at, slot, phase, ring, ready, free, D, SLOTS)


@gluon.jit
def _add_keys(
    x_s, x_t, ring, ready, free, slot, phase, m_s, m_t, first_keys, start, log2_scale, l_s, l_t, a,
    K: gl.constexpr, SLOTS: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """Add the tile of keys that begins at start, all of them before the rows, to the sums; with MASK those from
    first_keys on. Returns which buffer comes next, and the sums."""
    D: gl.constexpr = ring.shape[4]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    none = gl.zeros([BLOCK, BLOCK], gl.float32, mma)
    mbarrier.wait(ready.index(slot), phase)
    s = logits(x_s, ring.index(slot).reshape([BLOCK, D]), none, K)
    slot_t, phase_t = next_slot(slot, phase, SLOTS)
    mbarrier.wait(ready.index(slot_t), phase_t)
    t = logits(x_t, ring.index(slot_t).reshape([BLOCK, D]), none, K)
    s = warpgroup_mma_wait(1 if K == D else 2, deps=[s])
    mbarrier.arrive(free.index(slot))
    # beside the teacher's product
    z_s = exponent(s, log2_scale, m_s)
    keys = start + gl.arange(0, BLOCK, gl.SliceLayout(0, mma))
    if MASK:
        z_s = gl.where(keys[None, :] >= first_keys[:, None], z_s, MASKED)
    l_s += partial_sum(gl.exp2(z_s))
    t = warpgroup_mma_wait(0, deps=[t])
    mbarrier.arrive(free.index(slot_t))
    z_t = exponent(t, log2_scale, m_t)
    if MASK:
        # Always 0, which the compiler cannot know: it would keep the mask, for which there are no registers.
        z_t = gl.where(keys[None, :] >= (first_keys + (slot >> 30))[:, None], z_t, MASKED)
    p_t = gl.exp2(z_t)
    l_t += partial_sum(p_t)
    a += partial_sum(p_t * (z_t - z_s))
    slot, phase = next_slot(slot_t, phase_t, SLOTS)
    return slot, phase, l_s, l_t, a


@gluon.jit
def _forward_rows(
    starts, bounds, kl, pivot_s, pivot_t, sum_s, sum_t, flags, sequence, batch, tile, last, seq_len,
    first_row, keys_end, log2_scale, own_s, own_t, own_ready, ring, ready, free,
    HALF: gl.constexpr, D: gl.constexpr, K: gl.constexpr, SLOTS: gl.constexpr, SEGMENTS: gl.constexpr,
    VISIT: gl.constexpr, OWN: gl.constexpr,
):  # fmt: skip
    """64 rows. Sums as in README.md, but relative to a fixed pivot, the row's maximum in the tile on the diagonal.

    With the own key's logit below it, no sum comes near 0. A logit 2**127 times the pivot's weight would
    overflow one: then the flag is raised, and another kernel does the rows again with a running maximum. So it is where
    what the rows see is no run of keys (GENERAL). In a visit the pivots are given, and sums are added to those that are
    there, unless the flag is raised.
    """
    lo, lo_full, kind, other_lo, other_kind = 0, 0, 0, 0, 0
    if SEGMENTS:
        lo, lo_full, kind = bounds_of_rows(bounds, batch, 2 * tile + HALF, gl.cdiv(seq_len, BLOCK))
        other_lo, _, other_kind = bounds_of_rows(bounds, batch, 2 * tile + 1 - HALF, gl.cdiv(seq_len, BLOCK))
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    OF_ROWS: gl.constexpr = gl.SliceLayout(1, mma)
    OF_KEYS: gl.constexpr = gl.SliceLayout(0, mma)
    x_s = own_s.index(HALF).reshape([BLOCK, D])
    x_t = own_t.index(HALF).reshape([BLOCK, D])
    start = tile * ROWS + HALF * BLOCK
    rows = start + gl.arange(0, BLOCK, OF_ROWS)
    none = gl.zeros([BLOCK, BLOCK], gl.float32, mma)
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    # Tiles of keys behind all of these rows, which the other warpgroup's see: not looked at.
    behind = 0
    if HALF == 0:
        behind = gl.where(last > start, 1, 0) if VISIT else 1
        for _ in range(2 * behind):
            mbarrier.wait(ready.index(slot), phase)
            mbarrier.arrive(free.index(slot))
            slot, phase = next_slot(slot, phase, SLOTS)

    # The tile on the diagonal
    slot_t, phase_t = next_slot(slot, phase, SLOTS)
    mbarrier.wait(own_ready, 0)
    mbarrier.wait(ready.index(slot), phase)
    # The bounds have come beside the first tiles.
    count, full = _span(last, lo, lo_full, kind, SEGMENTS, VISIT)
    others, _ = _span(last, other_lo, 0, other_kind, SEGMENTS, VISIT)
    # Together they take one register less beside the tile on the diagonal.
    full_and_kind = full * 8 + kind
    s = logits(x_s, ring.index(slot).reshape([BLOCK, D]), none, K)
    mbarrier.wait(ready.index(slot_t), phase_t)
    t = logits(x_t, ring.index(slot_t).reshape([BLOCK, D]), none, K)
    s, t = warpgroup_mma_wait(0, deps=[s, t])
    mbarrier.arrive(free.index(slot))
    mbarrier.arrive(free.index(slot_t))
    keys = last - behind * BLOCK + gl.arange(0, BLOCK, OF_KEYS)
    first_keys = rows
    ends = rows
    if SEGMENTS:
        first_keys = gl.load(starts + rows, mask=rows < seq_len, other=seq_len)
    if VISIT:
        ends = gl.minimum(rows, keys_end - 1)
    visible = seen(first_keys, ends, keys, SEGMENTS)
    if VISIT:
        place = sequence.to(gl.int64) * (seq_len - first_row) + rows - first_row
        m_s = gl.load(pivot_s + place, mask=rows < seq_len, other=0.0)
        m_t = gl.load(pivot_t + place, mask=rows < seq_len, other=0.0)
    else:
        own_logit_s = own_logits(s, rows, keys, log2_scale)
        own_logit_t = own_logits(t, rows, keys, log2_scale)
        if OWN:
            place = sequence.to(gl.int64) * seq_len + rows
            gl.store(pivot_s + place, own_logit_s, mask=rows < seq_len)
            gl.store(pivot_t + place, own_logit_t, mask=rows < seq_len)
        m_s = gl.max(gl.where(visible, s * log2_scale, MASKED), 1)
        m_t = gl.max(gl.where(visible, t * log2_scale, MASKED), 1)
        excess_s = m_s - own_logit_s  # kept over the loop in the place of both
        excess_t = m_t - own_logit_t
    z_s = gl.where(visible, exponent(s, log2_scale, m_s), MASKED)
    z_t = gl.where(visible, exponent(t, log2_scale, m_t), MASKED)
    p_t = gl.exp2(z_t)
    l_s = partial_sum(gl.exp2(z_s))
    l_t = partial_sum(p_t)
    a = partial_sum(p_t * (z_t - z_s))

    slot, phase = next_slot(slot_t, phase_t, SLOTS)
    full = full_and_kind >> 3
    for j in range(behind + 1, full):
        slot, phase, l_s, l_t, a = _add_keys(
            x_s, x_t, ring, ready, free, slot, phase, m_s, m_t, first_keys, last - j * BLOCK, log2_scale, l_s, l_t, a,
            K, SLOTS, False,
        )  # fmt: skip
    if SEGMENTS:
        for j in range(gl.maximum(full, behind + 1), count):
            slot, phase, l_s, l_t, a = _add_keys(
                x_s, x_t, ring, ready, free, slot, phase, m_s, m_t, first_keys, last - j * BLOCK, log2_scale, l_s, l_t,
                a, K, SLOTS, True,
            )  # fmt: skip

        # Tiles that only the other warpgroup's rows see
        for _ in range(2 * count, 2 * others):
            mbarrier.wait(ready.index(slot), phase)
            mbarrier.arrive(free.index(slot))
            slot, phase = next_slot(slot, phase, SLOTS)

    # Made anew (slot >> 30 is 0, which the compiler cannot know), not kept in registers over the loop
    rows = start + (slot >> 30) + gl.arange(0, BLOCK, OF_ROWS)
    l_s = gl.convert_layout(gl.sum(l_s, 1), OF_ROWS)
    l_t = gl.convert_layout(gl.sum(l_t, 1), OF_ROWS)
    a = gl.convert_layout(gl.sum(a, 1), OF_ROWS)
    inside = rows < seq_len
    live = inside
    if SEGMENTS:
        live = inside & (first_keys <= rows)
    if VISIT:
        place = sequence.to(gl.int64) * (seq_len - first_row) + rows - first_row
        l_s += gl.load(sum_s + place, mask=inside, other=0.0)
        l_t += gl.load(sum_t + place, mask=inside, other=0.0)
        a += gl.load(kl + place, mask=inside, other=0.0)
    # False for NaN too
    finite = (l_s < 1e38) & (l_t < 1e38) & (gl.abs(a) < 1e38)
    again = live & (finite == 0)
    if SEGMENTS:
        again = again | (inside & (full_and_kind & GENERAL != 0))
    flag = gl.max(gl.where(again, 1, 0), 0)
    if VISIT:
        inside = inside & (flag == 0)
        gl.store(kl + place, a, mask=inside)
        gl.store(sum_s + place, l_s, mask=inside)
        gl.store(sum_t + place, l_t, mask=inside)
    else:
        place = sequence.to(gl.int64) * seq_len + rows
        value = (a / l_t - (gl.log2(l_t) - gl.log2(l_s))) * _LN2
        gl.store(kl + place, gl.where(live, value, 0.0), mask=inside)
        gl.store(sum_s + place, gl.where(live, _relative_sum(l_s, excess_s), 1.0), mask=inside)
        gl.store(sum_t + place, gl.where(live, _relative_sum(l_t, excess_t), 1.0), mask=inside)
    gl.store(flags + HALF, flag)


@gluon.jit(do_not_specialize=["heads", "group", "seq_len", "first_row", "keys_end"])
def forward_kernel(
    q_s, k_s, q_t, k_t, starts, bounds, kl, pivot_s, pivot_t, sum_s, sum_t, flags, heads, group, seq_len,
    first_row, keys_end, log2_scale,
    D: gl.constexpr, K: gl.constexpr, SLOTS: gl.constexpr, SEGMENTS: gl.constexpr, VISIT: gl.constexpr,
    OWN: gl.constexpr,
):  # fmt: skip
    """Rows of the divergence and both statistics, in one pass over the keys.

    q and k are descriptors of [B, H, T, channels] in blocks [1, 1, 64, D], of which K channels are used; kl float32
    [B, H, T], the sums too (see `triton_kernels.relative_sum`); flags int32 [B, H, row tiles, 2]; starts and bounds
    from `segment_kernels.starts_and_bounds`, of tiles of 64 rows and 64 keys. In a visit kl is a, which goes in and out
    as the sums themselves do, relative to the pivots (`torch_visit.State`); otherwise first_row and keys_end are not
    looked at, nor pivots, but that with OWN they get each row's logit with its own key, in units of log 2. The grid is
    `tiles.grid`'s.
    """
    dtype: gl.constexpr = q_s.dtype
    tiles = gl.cdiv(seq_len, ROWS)
    # The last row tiles have the most keys: they go first, so that none is left running alone at the end.
    tile = tiles - 1 - gl.program_id(1)
    sequence = gl.program_id(2) * gl.num_programs(0) + gl.program_id(0)
    batch = sequence // heads
    head = sequence % heads
    start = tile * ROWS
    starts += batch.to(gl.int64) * seq_len
    last = last_keys(tile, keys_end, BLOCK, VISIT)
    own = start
    if VISIT:
        own = start - first_row

    own_s = gl.allocate_shared_memory(dtype, [2, 1, 1, BLOCK, D], q_s.layout)
    own_t = gl.allocate_shared_memory(dtype, [2, 1, 1, BLOCK, D], q_t.layout)
    ring = gl.allocate_shared_memory(dtype, [SLOTS, 1, 1, BLOCK, D], k_s.layout)
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
        tma.async_copy_global_to_shared(q_s, [batch, head, own + i * BLOCK, 0], own_ready, own_s.index(i))
        tma.async_copy_global_to_shared(q_t, [batch, head, own + i * BLOCK, 0], own_ready, own_t.index(i))

    flags += (sequence * gl.num_programs(1) + gl.num_programs(1) - 1 - gl.program_id(1)) * 2
    gl.warp_specialize(
        [
            (_forward_rows, (
                starts, bounds, kl, pivot_s, pivot_t, sum_s, sum_t, flags, sequence, batch, tile, last, seq_len,
                first_row, keys_end, log2_scale, own_s, own_t, own_ready, ring, ready, free,
                0, D, K, SLOTS, SEGMENTS, VISIT, OWN,
            )),
            (_forward_rows, (
                starts, bounds, kl, pivot_s, pivot_t, sum_s, sum_t, flags, sequence, batch, tile, last, seq_len,
                first_row, keys_end, log2_scale, own_s, own_t, own_ready, ring, ready, free,
                1, D, K, SLOTS, SEGMENTS, VISIT, OWN,
            )),
            (_forward_fetch, (
                k_s, k_t, bounds, batch, head // group, tile, last, seq_len, ring, ready, free, D, SLOTS, SEGMENTS,
                VISIT,
            )),
        ],
        [4, 1],
        [104, 24],
    )  # fmt: skip
