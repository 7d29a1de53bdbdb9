"""What the Hopper kernels share, in Gluon, Triton's language of explicit layouts, memory and barriers.

The kernels run on compute capability 9.0, for 16-bit inputs, of up to 128 channels or, with `wide` in their names, of
more (and backward in deterministic mode of any). Work comes in row tiles of one head, 64 rows for each of two
warpgroups: one a program; a warp beside them fetches the tiles of keys with TMA. In backward up to 128 channels a
program takes one row tile after the other, up to 64 channels there are three such warpgroups, one more makes the keys'
gradient, and two more warps set it to 0 at first. Products are issued asynchronously, and each place that waits says
for what. Tiles of keys are visited from the diagonal backwards. What was tried besides, and what it gave, is in
TRIED.md.

Logits are kept in units of log 2, so that exponentials are exp2.

Tokens are counted along one sequence of keys and rows; in a visit (VISIT) the keys are the tokens [0, keys_end) and the
rows those from first_row on, as in `triton_kernels`.
"""

# What the decorators make of these functions is not what pyright reads.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma

from .tiles import HOPPER_BLOCK, HOPPER_ROWS

# Triton 3.7 renamed it.
barrier = getattr(gl, "barrier" if hasattr(gl, "barrier") else "thread_barrier")
# Stands for -inf, but its differences are no NaN.
MASKED = gl.constexpr(-1e30)
# Rows of a row tile, and of a warpgroup, which up to 128 channels is also how many keys a tile has.
ROWS = gl.constexpr(HOPPER_ROWS)
BLOCK = gl.constexpr(HOPPER_BLOCK)


@gluon.jit
def exponent(x, scale, offset):
    """x * scale - the row's offset, in one operation."""
    return gl.fma(x, gl.full_like(x, scale), gl.zeros_like(x) - offset[:, None])


@gluon.jit
def next_slot(slot, phase, SLOTS: gl.constexpr):
    """The next buffer of a ring, and the phase of its barrier."""
    slot += 1
    wrap = slot == SLOTS
    return gl.where(wrap, 0, slot), phase ^ wrap.to(gl.int32)


@gluon.jit
def names_of(segments, tokens, seq_len, alike):
    """What segment each token is in: negative for padding and beyond the sequence. Where all are known to be alike,
    this is segment 0, and nothing is read that would have to be waited for."""
    return gl.load(segments + tokens, mask=(tokens < seq_len) & (alike == 0), other=gl.where(alike, 0, -1))


@gluon.jit
def clear_padding(tile, segments, start, seq_len):
    """Set the tokens of padding of a tile [R, D] in shared memory to 0: they may hold anything, NaN included."""
    R: gl.constexpr = tile.shape[0]
    D: gl.constexpr = tile.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    names = names_of(segments, start + gl.arange(0, R, gl.SliceLayout(1, LAYOUT)), seq_len, False)
    # However they are swizzled, 64 channels of a token are 128 bytes side by side.
    lines = tile._reinterpret(gl.int32, [D // 64, R, 32], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    for panel in range(D // 64):
        x = lines.index(panel).load(LAYOUT)
        lines.index(panel).store(gl.where((names >= 0)[:, None], x, gl.zeros_like(x)))
    fence_async_shared()


@gluon.jit
def visible_pairs(segments, rows, keys, seq_len, keys_end, alike, SEGMENTS: gl.constexpr, VISIT: gl.constexpr):
    """[rows, keys]: whether the key is at or before the row and, with SEGMENTS, in its segment; see `names_of`."""
    visible = keys[None, :] <= rows[:, None]
    if VISIT:
        visible = visible & (keys < keys_end)[None, :]
    if SEGMENTS:
        row_names = names_of(segments, rows, seq_len, alike)
        key_names = names_of(segments, keys, seq_len, alike)
        visible = visible & (key_names[None, :] == row_names[:, None]) & (key_names >= 0)[None, :]
    return visible


@gluon.jit
def seen(starts, ends, keys, SEGMENTS: gl.constexpr):
    """[rows, keys]: whether the key is one from the row's first one to its last; without SEGMENTS the first is 0."""
    visible = keys[None, :] <= ends[:, None]
    if SEGMENTS:
        visible = visible & (keys[None, :] >= starts[:, None])
    return visible


@gluon.jit
def own_logits(product, rows, keys, scale):
    """Each row's logit with its own key, from the tile on the diagonal: the rounded product, which is what it must be
    relative to, not to be fused into a difference."""
    own = gl.sum(gl.where(keys[None, :] == rows[:, None], product, 0.0), 1)
    return gl.inline_asm_elementwise(
        "mul.rn.f32 $0, $1, $2;", "=f,f,f", [own, gl.full_like(own, scale)], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def logits(x, y, none, K: gl.constexpr):
    """x [R, D] times y [N, D] transposed, over the first K channels: issued as one product, or as two for K < D."""
    D: gl.constexpr = x.shape[1]
    if K == D:
        return warpgroup_mma(x, y.permute([1, 0]), none, use_acc=False, is_async=True)
    else:
        left = y.slice(0, D // 2, dim=1).permute([1, 0])
        s = warpgroup_mma(x.slice(0, D // 2, dim=1), left, none, use_acc=False, is_async=True)
        right = y.slice(D // 2, K - D // 2, dim=1).permute([1, 0])
        return warpgroup_mma(x.slice(D // 2, K - D // 2, dim=1), right, s, is_async=True)


@gluon.jit
def last_keys(tile, keys_end, N: gl.constexpr, VISIT: gl.constexpr):
    """The first token of the last tile of keys that a row tile may see, from which it goes backwards."""
    # The compiler is to see that this is where the rows begin, for N = ROWS: half of the pairs need no work then.
    last = tile * ROWS + ROWS - N
    if VISIT:
        last = gl.minimum(last, gl.cdiv(keys_end, N) * N - N)
    return last


@gluon.jit
def bounds_of(bounds, SEGMENTS: gl.constexpr):
    """(lo, lo_full, what the rows are) of `segment_kernels.tile_bounds`, of which bounds points to one row tile's. They
    take a microsecond to come, which passes beside whatever lies between this and their first use."""
    lo = 0
    lo_full = 0
    kind = 0
    if SEGMENTS:
        lo = gl.load(bounds)
        lo_full = gl.load(bounds + 1)
        kind = gl.load(bounds + 4)
    return lo, lo_full, kind


@gluon.jit
def bounds_of_rows(bounds, batch, block, blocks):
    """(lo, lo_full, what the rows are) of 64 rows by `segment_kernels.tile_bounds`, of which there are `blocks` a
    sequence; of rows behind its end that they see nothing."""
    place = bounds + (batch * blocks + block) * 5
    nowhere = (block + 1) * BLOCK
    lo = gl.load(place, mask=block < blocks, other=nowhere)
    lo_full = gl.load(place + 1, mask=block < blocks, other=nowhere)
    kind = gl.load(place + 4, mask=block < blocks, other=0)
    return lo, lo_full, kind


@gluon.jit
def span(last, lo, lo_full, N: gl.constexpr, VISIT: gl.constexpr):
    """(tiles of keys to visit from the last one backwards, one at least; how many of them, counted from there, need no
    mask but in the first)."""
    count = gl.cdiv(last + N - lo, N)
    if VISIT:
        count = gl.maximum(count, 1)
    return count, gl.maximum(gl.cdiv(last + N - lo_full, N), 1)
