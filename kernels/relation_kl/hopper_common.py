"""What the two Hopper kernels share, in Gluon, Triton's language of explicit layouts, memory and barriers.

The kernels run on compute capability 9.0, for 16-bit inputs of up to 128 channels. A program owns 128 rows of one
head. Two warpgroups do 64 of them each; a warp beside them fetches the tiles of keys with TMA. Products are issued
asynchronously, and each place that waits says for what. Tiles of keys are visited from the diagonal backwards. What was
tried besides, and what it gave, is in README.md.

Logits are kept in units of log 2, so that exponentials are exp2.

Tokens are counted along one sequence of keys and rows; in a visit (VISIT) the keys are the tokens [0, keys_end) and the
rows those from first_row on, as in `triton_kernels`.
"""

# What the decorators make of these functions is not what pyright reads.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from .tiles import HOPPER_ROWS

# Triton 3.7 renamed it.
barrier = getattr(gl, "barrier" if hasattr(gl, "barrier") else "thread_barrier")
# Stands for -inf, but its differences are no NaN.
MASKED = gl.constexpr(-1e30)
# Rows of a program, and of one of its two warpgroups.
ROWS = gl.constexpr(HOPPER_ROWS)
HALF_ROWS = gl.constexpr(HOPPER_ROWS // 2)


@gluon.jit
def exponent(x, scale, offset):
    """x * scale - the row's offset, in one operation."""
    return gl.fma(x, gl.full_like(x, scale), gl.zeros_like(x) - offset[:, None])


@gluon.jit
def names_of(segments, tokens, seq_len):
    """What segment each token is in: negative for padding and beyond the sequence."""
    return gl.load(segments + tokens, mask=tokens < seq_len, other=-1)


@gluon.jit
def visible_pairs(segments, rows, keys, seq_len, keys_end, SEGMENTS: gl.constexpr, VISIT: gl.constexpr):
    """[rows, keys]: whether the key is at or before the row and, with SEGMENTS, in its segment."""
    visible = keys[None, :] <= rows[:, None]
    if VISIT:
        visible = visible & (keys < keys_end)[None, :]
    if SEGMENTS:
        row_names = names_of(segments, rows, seq_len)
        key_names = names_of(segments, keys, seq_len)
        visible = visible & (key_names[None, :] == row_names[:, None]) & (key_names >= 0)[None, :]
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
def span(bounds, tile, tiles, batch, keys_end, N: gl.constexpr, SEGMENTS: gl.constexpr, VISIT: gl.constexpr):
    """(first token of the last tile of keys; tiles of keys to visit from there backwards, one at least; how many of
    them, counted from there, need no mask but in the first)."""
    # The compiler is to see that this is where the rows begin, for N = ROWS: half of the pairs need no work then.
    last = tile * ROWS + ROWS - N
    if VISIT:
        last = gl.minimum(last, gl.cdiv(keys_end, N) * N - N)
    lo = 0
    lo_full = 0
    if SEGMENTS:
        lo = gl.load(bounds + (batch * tiles + tile) * 4)
        lo_full = gl.load(bounds + (batch * tiles + tile) * 4 + 1)
    count = gl.cdiv(last + N - lo, N)
    if VISIT:
        count = gl.maximum(count, 1)
    return last, count, gl.maximum(gl.cdiv(last + N - lo_full, N), 1)
