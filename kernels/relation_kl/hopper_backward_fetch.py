"""The warp of the Hopper backward kernel that takes row tiles and fetches their rows and keys."""

# What the decorators make of these functions is not what pyright reads.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .hopper_common import HALF_ROWS, ROWS, bounds_of, last_keys, post, span
from .hopper_gradient import wait_zeroed


@gluon.jit
def turned(j, tile, begin, count, VISIT: gl.constexpr):
    """Which tile of keys comes j-th of the `count` from `begin` on: in a visit each row tile begins elsewhere, so that
    those which run together do not all add to the same gradient."""
    if VISIT:
        j += tile % count
        j = begin + gl.where(j >= count, j - count, j)
    return j


@gluon.jit
def _fetch_keys(
    k_s, k_t, at, fetched, ring_s, ring_t, ready_s, ready_t, free_s, free_t, N: gl.constexpr, D: gl.constexpr
):  # fmt: skip
    """A tile of keys, the student's and the teacher's, after `fetched` others."""
    slot = fetched % 2
    mbarrier.wait(free_s.index(slot), ((fetched // 2) & 1) ^ 1)
    mbarrier.expect(ready_s.index(slot), N * D * 2)
    tma.async_copy_global_to_shared(k_s, at, ready_s.index(slot), ring_s.index(slot))
    mbarrier.wait(free_t, (fetched & 1) ^ 1)
    mbarrier.expect(ready_t, N * D * 2)
    tma.async_copy_global_to_shared(k_t, at, ready_t, ring_t.index(0))


@gluon.jit
def fetch_row_tiles(
    q_s, k_s, q_t, k_t, bounds, progress, heads, group, together, own_tiles, items, most, seq_len, first_row, keys_end,
    whole, parts, box, posted, taken, own, own_ready, ring_s, ring_t, ready_s, ready_t, free_s, free_t,
    N: gl.constexpr, D: gl.constexpr, SEGMENTS: gl.constexpr, VISIT: gl.constexpr,
):  # fmt: skip
    """Take row tiles, one after the other, and fetch their rows and the tiles of keys that they see: two buffers for
    the student's, which are used twice, one for the teacher's. The next row tile's first keys come while the last one's
    are used."""
    tiles = gl.cdiv(seq_len, ROWS)
    fetched = gl.to_tensor(0)
    done = gl.to_tensor(0)
    number = gl.program_id(0)
    if not VISIT:
        number = gl.atomic_add(progress, 1, sem="relaxed")
    while number < items:
        place = number
        part = 0
        if VISIT:
            part = gl.where(number >= whole, (number - whole) % parts, 0)
            place = gl.where(number >= whole, whole + (number - whole) // parts, number)
        tile = tiles - 1 - place // together % own_tiles
        sequence = place // (together * own_tiles) * together + place % together
        batch = sequence // heads
        head = sequence % heads
        key_head = head // group
        last = last_keys(tile, keys_end, N, VISIT)
        lo, lo_full, kind = bounds_of(bounds + (batch * tiles + tile) * 5, SEGMENTS)
        first = tile * ROWS
        begin = 0
        count = 1  # enough for the first tile of keys, but in a visit
        if VISIT:
            first -= first_row
            count, full = span(last, lo, lo_full, N, VISIT)
            begin = gl.where(number >= whole, count * part // parts, 0)
            count = gl.where(number >= whole, count * (part + 1) // parts, count) - begin
        at = [batch, key_head, last - turned(0, tile, begin, count, VISIT) * N, 0]
        _fetch_keys(k_s, k_t, at, fetched, ring_s, ring_t, ready_s, ready_t, free_s, free_t, N, D)
        fetched += 1
        mbarrier.wait(taken, (done & 1) ^ 1)
        if not VISIT:
            # Behind that wait: before it ptxas would have the teacher's keys wait for the bounds, too.
            count, full = span(last, lo, lo_full, N, VISIT)
        post(box, posted, batch, head, key_head, tile, last, count, full * 8 + kind, begin)
        if not VISIT:
            # While the keys come, but before arriving at own_ready: whoever has the rows adds to the gradient.
            wait_zeroed(progress + 2 + sequence // group, own_tiles)
        # The last row tile is done with its rows as soon as it is with its last keys; the useless teacher's product
        # after those may read what comes.
        before = fetched - 2
        mbarrier.wait(free_s.index(fetched % 2), (before // 2) & 1, pred=before >= 0)
        mbarrier.expect(own_ready, 2 * ROWS * D * 2)
        for i in gl.static_range(2):
            here = [batch, head, first + i * HALF_ROWS, 0]
            tma.async_copy_global_to_shared(q_s, here, own_ready, own.index(i))
            tma.async_copy_global_to_shared(q_t, here, own_ready, own.index(2 + i))
        for j in range(1, count):
            at = [batch, key_head, last - turned(j, tile, begin, count, VISIT) * N, 0]
            _fetch_keys(k_s, k_t, at, fetched, ring_s, ring_t, ready_s, ready_t, free_s, free_t, N, D)
            fetched += 1
        done += 1
        number = items
        if not VISIT:
            number = gl.where(done < most, gl.atomic_add(progress, 1, mask=done < most, sem="relaxed"), items)
    mbarrier.wait(taken, (done & 1) ^ 1)
    post(box, posted, 0, 0, 0, 0, 0, 0, 0, 0)
