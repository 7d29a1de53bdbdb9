"""The warp of the Hopper backward kernel that takes row tiles and fetches their rows and keys, and how it tells the
others of them."""

# What the decorators make of these functions is not what pyright reads.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .hopper_common import BLOCK, barrier, bounds_of_rows, next_slot
from .hopper_gradient import wait_zeroed

# What a row tile is told of by: these, and for each of three warpgroups lo + what its rows are, and lo_full
# (`segment_kernels.tile_bounds`). The batch and the head of the keys follow from the sequence, but by divisions.
SEQUENCE, TILE, LAST, COUNT, BEGIN, BATCH, KEY_HEAD = (gl.constexpr(i) for i in range(7))
LO, LO_FULL, FIELDS = gl.constexpr(7), gl.constexpr(10), gl.constexpr(16)


@gluon.jit
def turned(j, tile, begin, count, VISIT: gl.constexpr):
    """Which tile of keys comes j-th of the `count` from `begin` on: in a visit each row tile begins elsewhere, so that
    those which run together do not all add to the same gradient."""
    if VISIT:
        j += tile % count
        j = begin + gl.where(j >= count, j - count, j)
    return j


@gluon.jit
def received(box, posted, taken, phase):
    """The fields of the next row tile, in each of the warpgroups."""
    mbarrier.wait(posted, phase)
    x = box.load(gl.BlockedLayout([FIELDS], [32], [4], [0]))
    mbarrier.arrive(taken)
    return x


@gluon.jit
def field(x, number: gl.constexpr):
    """One of those that were received."""
    return gl.sum(gl.where(gl.arange(0, FIELDS, x.type.layout) == number, x, 0), 0)


@gluon.jit
def _fetch_keys(k_s, k_t, at, slot, phase, ring, ready, free, SLOTS: gl.constexpr):
    """A tile of keys, the student's and the teacher's; returns which buffers are next then."""
    mbarrier.wait(free.index(slot), phase)
    mbarrier.expect(ready.index(slot), 2 * ring.shape[3] * ring.shape[4] * 2)
    tma.async_copy_global_to_shared(k_s, at, ready.index(slot), ring.index(2 * slot))
    tma.async_copy_global_to_shared(k_t, at, ready.index(slot), ring.index(2 * slot + 1))
    return next_slot(slot, phase, SLOTS)


@gluon.jit
def fetch_row_tiles(
    given, PARTS: gl.constexpr, SLOTS: gl.constexpr, SEGMENTS: gl.constexpr, VISIT: gl.constexpr
):  # fmt: skip
    """Take row tiles, one after the other, and fetch their rows and the tiles of keys that they see. The next row
    tile's first keys come while the last one's are used."""
    (
        q_s, k_s, q_t, k_t, bounds, progress, heads, group, together, own_tiles, items, most, seq_len, first_row,
        keys_end, whole, parts, box, posted, taken, own, own_ready, weights_ready, weights_free, ring, ready, free,
    ) = given  # fmt: skip
    ROWS: gl.constexpr = PARTS * BLOCK
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])  # a field a lane: this warp has few registers
    fields = gl.arange(0, FIELDS, LAYOUT)
    blocks = gl.cdiv(seq_len, BLOCK)
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(1)
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
        tile = own_tiles - 1 - place // together % own_tiles
        sequence = place // (together * own_tiles) * together + place % together
        batch = sequence // heads
        head = sequence % heads
        key_head = head // group
        start = first_row + tile * ROWS
        # From the last tile of keys that the row tile may see it goes backwards.
        last = gl.minimum(start + ROWS, blocks * BLOCK) - BLOCK
        if VISIT:
            last = gl.minimum(last, gl.cdiv(keys_end, BLOCK) * BLOCK - BLOCK)
        x = gl.where(fields == SEQUENCE, sequence, gl.where(fields == TILE, tile, last))
        x = gl.where(fields == BATCH, batch, gl.where(fields == KEY_HEAD, key_head, x))
        lo = gl.to_tensor(0)
        if SEGMENTS:
            lo = start
            for i in gl.static_range(PARTS):
                own_lo, lo_full, kind = bounds_of_rows(bounds, batch, start // BLOCK + i, blocks)
                lo = gl.minimum(lo, own_lo)
                x = gl.where(fields == LO + i, own_lo + kind, gl.where(fields == LO_FULL + i, lo_full, x))
        begin = 0
        count = 1  # enough for the first tile of keys, but in a visit
        if VISIT:
            count = gl.maximum((last + BLOCK - lo) // BLOCK, 1)
            begin = gl.where(number >= whole, count * part // parts, 0)
            count = gl.where(number >= whole, count * (part + 1) // parts, count) - begin
        # Where the last row tile's last weights are: with them its teacher's rows are done with, and when they have
        # been used, its student's are. None follow there before these rows have come, so that a phase says which ones
        # are meant. In a visit there was no row tile before.
        final = gl.where(slot == 0, SLOTS - 1, slot - 1)
        final_phase = phase ^ gl.where(slot == 0, 0, 1)
        at = [batch, key_head, last - turned(0, tile, begin, count, VISIT) * BLOCK, 0]
        slot, phase = _fetch_keys(k_s, k_t, at, slot, phase, ring, ready, free, SLOTS)
        mbarrier.wait(taken, (done & 1) ^ 1)
        if not VISIT:
            # Behind that wait: before it ptxas would have the keys wait for the bounds, too.
            count = (last + BLOCK - lo) // BLOCK
        box.store(gl.where(fields == COUNT, count, gl.where(fields == BEGIN, begin, x)))
        barrier()
        mbarrier.arrive(posted)
        if not VISIT:
            # While the keys come, but before arriving at own_ready: whoever has the rows adds to the gradient.
            wait_zeroed(progress + 2 + sequence // group, gl.cdiv(seq_len, 2 * BLOCK))
            mbarrier.wait(weights_ready.index(final), final_phase, pred=done > 0)
        mbarrier.expect(own_ready, 2 * ROWS * own.shape[4] * 2)
        for i in gl.static_range(PARTS):
            here = [batch, head, tile * ROWS + i * BLOCK, 0]
            tma.async_copy_global_to_shared(q_t, here, own_ready, own.index(PARTS + i))
        if not VISIT:
            mbarrier.wait(weights_free.index(final), final_phase, pred=done > 0)
        for i in gl.static_range(PARTS):
            here = [batch, head, tile * ROWS + i * BLOCK, 0]
            tma.async_copy_global_to_shared(q_s, here, own_ready, own.index(i))
        for j in range(1, count):
            at = [batch, key_head, last - turned(j, tile, begin, count, VISIT) * BLOCK, 0]
            slot, phase = _fetch_keys(k_s, k_t, at, slot, phase, ring, ready, free, SLOTS)
        done += 1
        number = items
        if not VISIT:
            number = gl.where(done < most, gl.atomic_add(progress, 1, mask=done < most, sem="relaxed"), items)
    if not VISIT:
        mbarrier.wait(taken, (done & 1) ^ 1)
        box.store(gl.zeros([FIELDS], gl.int32, LAYOUT))
        barrier()
        mbarrier.arrive(posted)
