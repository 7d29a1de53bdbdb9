"""The Hopper backward kernel for 129 to 256 channels, and for deterministic mode; see hopper_common.py for what it
shares with the others.

Twice as many channels leave no room to add up the gradient of the keys beside that of the rows. So each program makes
the whole gradient of its 128 tokens, as `triton_kernels.backward_kernel` does: from the keys that they see, with their
own statistics, and then from the tokens that see them, with those tokens' statistics. It writes each number once: the
same call gives the same bits. The two warpgroups share nothing but what they read.
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

from .hopper_common import BLOCK, ROWS, barrier, clear_padding, logits, names_of
from .segment_kernels import ALIKE, PADDED


@gluon.jit
def _tiles(bounds, place, start, seq_len, N: gl.constexpr, SEGMENTS: gl.constexpr):
    """(tiles of keys from the row tile's last one backwards, how many of them need no mask but in the row tile itself;
    the same of tiles of rows from the row tile's first one on; what the row tile is, of `tile_bounds`)."""
    lo = 0
    lo_full = 0
    hi_full = seq_len
    hi = seq_len
    kind = 0
    if SEGMENTS:
        lo = gl.load(bounds + place)
        lo_full = gl.load(bounds + place + 1)
        hi_full = gl.load(bounds + place + 2)
        hi = gl.load(bounds + place + 3)
        kind = gl.load(bounds + place + 4)
    end = start + ROWS
    # A tile of padding visits itself, for nothing.
    above = gl.maximum(gl.cdiv(hi - start, N), 1)
    return gl.cdiv(end - lo, N), gl.cdiv(end - lo_full, N), above, gl.cdiv(hi_full - start, N), kind


@gluon.jit
def _fetch_tiles(
    y_s, y_t, statistics, tokens, batch, head, first, at, count, fetched, seq_len,
    ring_s, ring_t, columns, ready_s, ready_t, free_s, free_t,
    N: gl.constexpr, D: gl.constexpr, ABOVE: gl.constexpr,
):  # fmt: skip
    """Fetch `count` tiles of one head: up from token `at` for ABOVE, with statistics, where the head's begin with
    number `first`; else down from there."""
    offsets = gl.arange(0, N, gl.BlockedLayout([2], [32], [1], [0]))
    for _ in range(count):
        slot = fetched % 2
        if ABOVE:
            real = at + offsets < seq_len
            place = statistics + first + at + offsets
            m_s = gl.load(place, mask=real, other=0.0)
            place += tokens
            m_t = gl.load(place, mask=real, other=0.0)
            place += tokens
            r = gl.load(place, mask=real, other=-1.0)
            place += tokens
            g = gl.load(place, mask=real, other=0.0)
        mbarrier.wait(free_s.index(slot), ((fetched // 2) & 1) ^ 1)
        mbarrier.expect(ready_s.index(slot), N * D * 2)
        tma.async_copy_global_to_shared(y_s, [batch, head, at, 0], ready_s.index(slot), ring_s.index(slot))
        if ABOVE:
            columns.index(slot * 4).store(m_s)
            columns.index(slot * 4 + 1).store(m_t)
            columns.index(slot * 4 + 2).store(r)
            columns.index(slot * 4 + 3).store(g)
            barrier()
        mbarrier.arrive(ready_s.index(slot))
        mbarrier.wait(free_t, (fetched & 1) ^ 1)
        mbarrier.expect(ready_t, N * D * 2)
        tma.async_copy_global_to_shared(y_t, [batch, head, at, 0], ready_t, ring_t.index(0))
        fetched += 1
        at += N if ABOVE else -N
    return fetched


@gluon.jit
def _backward_fetch(
    y_s, y_t, statistics, tokens, batch, head, heads, group, start, below, above, seq_len,
    ring_s, ring_t, columns, ready_s, ready_t, free_s, free_t,
    N: gl.constexpr, D: gl.constexpr, BELOW: gl.constexpr, ABOVE: gl.constexpr,
):  # fmt: skip
    """Fetch the tiles in the order in which they are used: two buffers for the student's, which are used twice, one for
    the teacher's."""
    fetched = gl.to_tensor(0)
    if BELOW:
        fetched = _fetch_tiles(
            y_s, y_t, statistics, tokens, batch, head // group, 0, start + ROWS - N, below,
            fetched, seq_len, ring_s, ring_t, columns, ready_s, ready_t, free_s, free_t, N, D, False,
        )  # fmt: skip
    if ABOVE:
        for query_head in range(head * group, (head + 1) * group):
            first = (batch * heads * group + query_head).to(gl.int64) * seq_len
            fetched = _fetch_tiles(
                y_s, y_t, statistics, tokens, batch, query_head, first, start, above,
                fetched, seq_len, ring_s, ring_t, columns, ready_s, ready_t, free_s, free_t, N, D, True,
            )  # fmt: skip


@gluon.jit
def _spread(of_rows, of_columns, x, ABOVE: gl.constexpr):
    """One number a row, or a column for ABOVE, in the shape of x."""
    if ABOVE:
        return gl.broadcast(x, of_columns[None, :])[1]
    else:
        return gl.broadcast(x, of_rows[:, None])[1]


@gluon.jit
def _exponentials(x, scale, m, columns, ABOVE: gl.constexpr):
    """2 to the power of the logits less their row's pivot, which for ABOVE is in columns."""
    of_columns = m
    if ABOVE:
        of_columns = columns.load(gl.SliceLayout(0, x.type.layout))
    # As in forward, in one operation.
    return gl.exp2(gl.fma(x, gl.full_like(x, scale), _spread(-m, -of_columns, x, ABOVE)))


@gluon.jit
def _weights(e_s, e_t, r, g, ratios, factors, ABOVE: gl.constexpr):
    """W = g (e_s / l_s - e_t / l_t) = (e_t - e_s r) (-g / l_t), given -r and -g / l_t: to turn the sign of e_t would
    take an instruction an element. Where student and teacher are equal, r is 1 and W exactly 0."""
    r_columns = r
    g_columns = g
    if ABOVE:
        r_columns = ratios.load(gl.SliceLayout(0, e_s.type.layout))
        g_columns = factors.load(gl.SliceLayout(0, e_s.type.layout))
    return gl.fma(e_s, _spread(r, r_columns, e_s, ABOVE), e_t) * _spread(g, g_columns, e_s, ABOVE)


@gluon.jit
def _backward_part(
    acc, visited, segments, bounds, m_s, m_t, r, g, rows, start, count, full, total, seq_len, alike, scale,
    own, ring_s, ring_t, columns, ready_s, ready_t, free_s, free_t,
    HALF: gl.constexpr, N: gl.constexpr, D: gl.constexpr, K: gl.constexpr, SEGMENTS: gl.constexpr, ABOVE: gl.constexpr,
):  # fmt: skip
    """Add to acc [64, D] what comes from `total` tiles, `count` of each head, of which those from `full` on need a mask
    as the first two do, which are the row tile itself. m_s, m_t, r and g, of the rows, are not looked at for ABOVE."""
    dtype: gl.constexpr = ring_s.dtype
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    OF_PRODUCT: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    # Of one set of logits
    PRODUCTS: gl.constexpr = 1 if K == D else 2
    none = gl.zeros([BLOCK, N], gl.float32, mma)

    # Always 0, which the compiler cannot know; see `fresh`.
    again = total >> 30
    slot = visited % 2
    mbarrier.wait(ready_s.index(slot), (visited // 2) & 1)
    s = logits(own.index(HALF + again).reshape([BLOCK, D]), ring_s.index(slot).reshape([N, D]), none, K)
    mbarrier.wait(ready_t, visited & 1)
    t = logits(own.index(2 + HALF + again).reshape([BLOCK, D]), ring_t.index(again).reshape([N, D]), none, K)
    s, t = warpgroup_mma_wait(0, deps=[s, t])
    mbarrier.arrive(free_t)
    e_s = _exponentials(s, scale, m_s, columns.index(slot * 4), ABOVE)
    j = gl.to_tensor(0)
    for i in range(total):
        slot = visited % 2
        following = slot ^ 1
        # Always 0, which the compiler cannot know: it would keep the operands' 64-bit descriptors over the whole
        # loop, more than there are registers for, where a few additions make them anew.
        fresh = i >> 30
        e_t = _exponentials(t, scale, m_t, columns.index(slot * 4 + 1), ABOVE)
        w = _weights(e_s, e_t, r, g, columns.index(slot * 4 + 2), columns.index(slot * 4 + 3), ABOVE).to(dtype)
        y = ring_s.index(slot).reshape([N, D])
        if (j < ROWS // N) | (j >= full):
            first = (start + j * N) if ABOVE else (start + ROWS - N - j * N)
            if SEGMENTS:
                kind = gl.load(bounds + first // ROWS * 5 + 4)
                if kind == PADDED:
                    # Both warpgroups do it: neither needs to wait for the other then.
                    clear_padding(y, segments, first, seq_len)
                    barrier()
            tokens = first + gl.arange(0, N, gl.SliceLayout(0, mma))
            w = _without_invisible(w, segments, rows, tokens, seq_len, alike & (j < ROWS // N), SEGMENTS, ABOVE)
        acc = warpgroup_mma(gl.convert_layout(w, OF_PRODUCT), y, acc, is_async=True)
        # Behind it in the queue are the next tile's logits; after the last tile they are taken of what the buffers
        # hold, and not used.
        mbarrier.wait(ready_s.index(following), ((visited + 1) // 2) & 1, pred=i + 1 < total)
        x = own.index(HALF + fresh).reshape([BLOCK, D])
        s = logits(x, ring_s.index(following).reshape([N, D]), none, K)
        acc = warpgroup_mma_wait(PRODUCTS, deps=[acc])
        mbarrier.arrive(free_s.index(slot))
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.wait(ready_t, (visited + 1) & 1, pred=i + 1 < total)
        x = own.index(2 + HALF + fresh).reshape([BLOCK, D])
        t = logits(x, ring_t.index(fresh).reshape([N, D]), none, K)
        # beside the teacher's product
        e_s = _exponentials(s, scale, m_s, columns.index(following * 4), ABOVE)
        t = warpgroup_mma_wait(0, deps=[t])
        mbarrier.arrive(free_t, pred=i + 1 < total)
        visited += 1
        j += 1
        j = gl.where(j == count, 0, j)
    return acc, visited


@gluon.jit
def _without_invisible(w, segments, rows, tokens, seq_len, alike, SEGMENTS: gl.constexpr, ABOVE: gl.constexpr):
    """The weights with those of pairs set to 0 of which neither, or the wrong one, sees the other."""
    visible = tokens[None, :] >= rows[:, None] if ABOVE else tokens[None, :] <= rows[:, None]
    if SEGMENTS:
        row_names = names_of(segments, rows, seq_len, alike)
        names = names_of(segments, tokens, seq_len, alike)
        visible = visible & (names[None, :] == row_names[:, None]) & (names >= 0)[None, :]
    return gl.where(visible, w, gl.zeros_like(w))


@gluon.jit
def _backward_rows(
    segments, bounds, statistics, tokens, unit, grad, sequence, group, start,
    below, below_full, above, above_full, kind, seq_len, channels, scale, softmax_scale,
    own, own_ready, ring_s, ring_t, columns, ready_s, ready_t, free_s, free_t,
    HALF: gl.constexpr, N: gl.constexpr, D: gl.constexpr, K: gl.constexpr, SEGMENTS: gl.constexpr,
    BELOW: gl.constexpr, ABOVE: gl.constexpr, NARROW: gl.constexpr,
):  # fmt: skip
    """64 rows."""
    dtype: gl.constexpr = ring_s.dtype
    mma_d: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    OF_ROWS: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16]))
    rows = start + HALF * BLOCK + gl.arange(0, BLOCK, OF_ROWS)
    acc = gl.zeros([BLOCK, D], gl.float32, mma_d)
    visited = gl.to_tensor(0)
    mbarrier.wait(own_ready, 0)
    if BELOW:
        live = rows < seq_len
        if SEGMENTS:
            live = names_of(segments, rows, seq_len, kind == ALIKE) >= 0
        place = statistics + sequence.to(gl.int64) * seq_len + rows
        m_s = gl.load(place, mask=live, other=0.0)
        place += tokens
        m_t = gl.load(place, mask=live, other=0.0)
        place += tokens
        r = gl.load(place, mask=live, other=-1.0)
        place += tokens
        g = gl.load(place, mask=live, other=0.0)
        acc, visited = _backward_part(
            acc, visited, segments, bounds, m_s, m_t, r, g, rows, start, below, below_full, below, seq_len,
            kind == ALIKE, scale, own, ring_s, ring_t, columns, ready_s, ready_t, free_s, free_t,
            HALF, N, D, K, SEGMENTS, False,
        )  # fmt: skip
    if ABOVE:
        nothing = gl.zeros([BLOCK], gl.float32, OF_ROWS)
        acc, visited = _backward_part(
            acc, visited, segments, bounds, nothing, nothing, nothing, nothing, rows, start, above, above_full,
            above * group, seq_len, kind == ALIKE, scale, own, ring_s, ring_t, columns, ready_s, ready_t, free_s,
            free_t, HALF, N, D, K, SEGMENTS, True,
        )  # fmt: skip

    factor = softmax_scale
    if NARROW:
        factor = softmax_scale * gl.load(unit)
    rows = start + HALF * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(1, mma_d))
    result = acc * factor
    if SEGMENTS:
        # A row of padding can hold anything by now, NaN included: it is replaced, not multiplied.
        live = names_of(segments, rows, seq_len, kind == ALIKE) >= 0
        result = gl.where(live[:, None], result, 0.0)
    columns_d = gl.arange(0, D, gl.SliceLayout(0, mma_d))
    place = sequence.to(gl.int64) * seq_len + rows
    pointers = grad + place[:, None] * channels + columns_d[None, :]
    gl.store(pointers, result.to(dtype), mask=(rows < seq_len)[:, None] & (columns_d < channels)[None, :])


@gluon.jit(do_not_specialize=["tokens", "heads", "group", "seq_len"])
def wide_backward_kernel(
    x_s, y_s, x_t, y_t, segments, bounds, statistics, tokens, unit, grad,
    heads, group, seq_len, channels, log2_scale, softmax_scale,
    N: gl.constexpr, D: gl.constexpr, K: gl.constexpr, SEGMENTS: gl.constexpr, BELOW: gl.constexpr,
    ABOVE: gl.constexpr, NARROW: gl.constexpr,
):  # fmt: skip
    """The gradient of one row tile of one head of x, whole; BELOW and ABOVE as for `triton_kernels.backward_kernel`.

    x and y are descriptors of [B, H, T, channels] in blocks [1, 1, 64, D] and [1, 1, N, D], of which logits take the
    first K channels. statistics is float32 [4, tokens], with tokens = B * query heads * T: both pivots, l_t / l_s, and
    g / l_t; with NARROW, g is in units of unit[0]. grad is [B, heads, T, channels], contiguous; bounds are from
    `segment_kernels.tile_bounds(ids, 128, N)`. The grid is `tiles.grid`'s.
    """
    dtype: gl.constexpr = x_s.dtype
    tiles = gl.cdiv(seq_len, ROWS)
    # Programs with the most to visit go first: the last tiles below, the first above; both together are even.
    tile = gl.program_id(1)
    if not ABOVE:
        tile = tiles - 1 - tile
    sequence = gl.program_id(2) * gl.num_programs(0) + gl.program_id(0)
    batch = sequence // heads
    head = sequence % heads
    start = tile * ROWS
    segments += batch.to(gl.int64) * seq_len
    bounds += batch * tiles * 5
    below, below_full, above, above_full, kind = _tiles(bounds, tile * 5, start, seq_len, N, SEGMENTS)

    # The student's rows, and the teacher's
    own = gl.allocate_shared_memory(dtype, [4, 1, 1, BLOCK, D], x_s.layout)
    ring_s = gl.allocate_shared_memory(dtype, [2, 1, 1, N, D], y_s.layout)
    ring_t = gl.allocate_shared_memory(dtype, [1, 1, 1, N, D], y_t.layout)
    # For ABOVE, of the tokens in each buffer of the student's: both maxima, l_t / l_s, and g / l_t
    columns = gl.allocate_shared_memory(gl.float32, [2 * 4, N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    own_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    ready_s = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    free_s = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ready_t = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    free_t = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        # TMA and the statistics
        mbarrier.init(ready_s.index(i), count=2)
        mbarrier.init(free_s.index(i), count=2)
    mbarrier.init(own_ready, count=1)
    mbarrier.init(ready_t, count=1)
    mbarrier.init(free_t, count=2)
    fence_async_shared()
    mbarrier.expect(own_ready, 2 * ROWS * D * 2)
    for i in gl.static_range(2):
        tma.async_copy_global_to_shared(x_s, [batch, head, start + i * BLOCK, 0], own_ready, own.index(i))
        tma.async_copy_global_to_shared(x_t, [batch, head, start + i * BLOCK, 0], own_ready, own.index(2 + i))

    gl.warp_specialize(
        [
            (_backward_rows, (
                segments, bounds, statistics, tokens, unit, grad, sequence, group, start,
                below, below_full, above, above_full, kind, seq_len, channels, log2_scale, softmax_scale,
                own, own_ready, ring_s, ring_t, columns, ready_s, ready_t, free_s, free_t,
                0, N, D, K, SEGMENTS, BELOW, ABOVE, NARROW,
            )),
            (_backward_rows, (
                segments, bounds, statistics, tokens, unit, grad, sequence, group, start,
                below, below_full, above, above_full, kind, seq_len, channels, log2_scale, softmax_scale,
                own, own_ready, ring_s, ring_t, columns, ready_s, ready_t, free_s, free_t,
                1, N, D, K, SEGMENTS, BELOW, ABOVE, NARROW,
            )),
            (_backward_fetch, (
                y_s, y_t, statistics, tokens, batch, head, heads, group, start, below, above,
                seq_len, ring_s, ring_t, columns, ready_s, ready_t, free_s, free_t, N, D, BELOW, ABOVE,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
