"""Gradients that several programs of the Hopper backward kernel add to: float32 in register order.

64 tokens lie as the 128 threads of a warpgroup hold them, [K / 8, 128, 4], which is 8 of the K channels, a thread, and
this thread's 2 x 2 numbers of tokens r and r + 8 and of neighbouring channels. So each thread puts 16 bytes beside
those of the thread before it into shared memory, and TMA reads 16 KiB in a row. `finish_kernel` brings them into order.

An accumulator is a tuple. Tensors' shapes are powers of two: for K < D there are two, of the first D / 2 channels and
of the others, so that no padding is multiplied or sent; else there is one. It leaves in two pieces: these two, or the
halves of the one.
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
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_common import BLOCK, barrier


@builtin
def _reduce_add(descriptor, coordinates, source, _semantic: Any = None):
    """Add a tile of shared memory to device memory, asynchronously. Gluon has no name for it, but Triton's builder."""
    coordinates = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, descriptor.handle, coordinates, source.handle)


@gluon.constexpr_function
def _layout(channels):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, channels, 16])


@gluon.jit
def _zeros(channels: gl.constexpr):
    return gl.zeros([BLOCK, channels], gl.float32, _layout(channels))


@gluon.jit
def zero_gradient(D: gl.constexpr, K: gl.constexpr):
    """An accumulator of 64 tokens."""
    if K == D:
        return (_zeros(D),)
    else:
        return _zeros(D // 2), _zeros(K - D // 2)


@gluon.jit
def _product(x, y, acc, use_acc: gl.constexpr):
    if isinstance(x, gl.tensor):
        x = gl.convert_layout(x, gl.DotOperandLayout(0, _layout(y.shape[1]), 2))
    return warpgroup_mma(x, y, acc, use_acc=use_acc, is_async=True)


@gluon.jit
def gradient_product(x, y, acc, K: gl.constexpr, use_acc: gl.constexpr):
    """x times y [N, D], over its first K channels, plus acc: issued, a product for each part of the accumulator."""
    D: gl.constexpr = y.shape[1]
    if K == D:
        return (_product(x, y, acc[0], use_acc),)
    else:
        left = _product(x, y.slice(0, D // 2, dim=1), acc[0], use_acc)
        return left, _product(x, y.slice(D // 2, K - D // 2, dim=1), acc[1], use_acc)


@gluon.jit
def wait_for(acc, behind: gl.constexpr):
    """An accumulator when no more products are in flight than the `behind` last ones."""
    if len(acc) == 1:
        return (warpgroup_mma_wait(behind, deps=[acc[0]]),)
    else:
        return warpgroup_mma_wait(behind, deps=[acc[0], acc[1]])


@gluon.jit
def in_register_order(acc):
    """An accumulator as the two pieces [channels / 4, 256] in which it leaves."""
    if len(acc) == 1:
        D: gl.constexpr = acc[0].shape[1]
        # [warp, r or r + 8, row, half, 8 channels, pair, channel]
        x = acc[0].reshape([4, 2, 8, 2, D // 16, 4, 2]).permute(3, 4, 0, 2, 5, 1, 6)
        return x.reshape([2, D // 8, 256]).permute(1, 2, 0).split()
    else:
        return _lines(acc[0]), _lines(acc[1])


@gluon.jit
def _lines(x):
    C: gl.constexpr = x.shape[1]
    # [warp, r or r + 8, row, 8 channels, pair, channel]
    return x.reshape([4, 2, 8, C // 8, 4, 2]).permute(3, 0, 2, 4, 1, 5).reshape([C // 4, 256])


@gluon.jit
def put(piece, room):
    """Store it where room [1, 1, 1, lines, 256] begins."""
    lines: gl.constexpr = room.shape[3]
    room = room.reshape([lines, 256])
    if piece.shape[0] < lines:
        room = room.slice(0, piece.shape[0], dim=0)
    room.store(piece)


@gluon.jit
def send(acc, descriptor, batch, head, block, left, right):
    """Add 64 tokens to a gradient in register order, through a buffer for each piece, which nothing may be leaving. Of
    the second piece's buffer TMA leaves out what is beyond the K channels."""
    first, second = in_register_order(acc)
    put(first, left)
    put(second, right)
    fence_async_shared()
    barrier()
    _reduce_add(descriptor, [batch, head, block, 0, 0], left)
    _reduce_add(descriptor, [batch, head, block, left.shape[3], 0], right)


@gluon.jit
def send_through(acc, descriptor, batch, head, block, room):
    """The same through one buffer, one piece after the other."""
    for i in gl.static_range(2):
        piece = in_register_order(acc)[i]
        tma.store_wait(0)
        barrier()
        put(piece, room)
        fence_async_shared()
        barrier()
        _reduce_add(descriptor, [batch, head, block, i * room.shape[3], 0], room)


@gluon.jit
def wait_zeroed(zeroed, tiles):
    """Wait until all tiles of a gradient are 0, by their counter.

    They were stored as ordinary numbers are; the fence is for TMA, which is to add to them. That may be another warp's,
    of the same program, if it waits for a barrier at which this one arrives afterwards.
    """
    gl.inline_asm_elementwise(
        "{ .reg .pred done; .reg .b32 count; waitLoop: ld.acquire.gpu.global.b32 count, [$1];"
        "setp.ge.s32 done, count, $2; @!done bra waitLoop; fence.proxy.async.global; mov.b32 $0, count; }",
        "=r,l,r", [zeroed.to(gl.int64, bitcast=True), tiles], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def set_to_zero(
    sums, progress, sequences, own_tiles, tokens, K: gl.constexpr, VISIT: gl.constexpr, WARPS: gl.constexpr
):  # fmt: skip
    """Set gradients to 0 beside those who compute, in the order in which the row tiles come by; in a visit, nothing.

    Each program's warps take tiles of 128 tokens by tickets until there are none left; they wait for nobody.

    Args:
        sums: float32, the gradients in register order, in device memory; anything at first.
        progress: see `hopper_backward.backward_kernel`.
        sequences: of keys.
        own_tiles: tiles of a sequence.
        tokens: of a sequence.
    """
    if not VISIT:
        LAYOUT: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])
        AT_ONCE: gl.constexpr = 128 * WARPS
        numbers = gl.arange(0, AT_ONCE, LAYOUT)
        blocks = gl.cdiv(tokens, 64)
        ticket = gl.atomic_add(progress + 1, 1, sem="relaxed")
        # Not compared with the product of both: it would be kept in a register for the whole kernel.
        while ticket // own_tiles < sequences:
            sequence = ticket // own_tiles
            block = ticket % own_tiles * 2
            place = sums + (sequence * blocks + block).to(gl.int64) * 64 * K + numbers
            for i in gl.static_range(128 * K // AT_ONCE):
                # The last tile may be of 64 tokens.
                inside = (block + i * AT_ONCE // (64 * K) < blocks) & (numbers >= 0)
                gl.store(place + i * AT_ONCE, gl.zeros([AT_ONCE], gl.float32, LAYOUT), mask=inside)
            barrier()
            gl.atomic_add(progress + (2 + sequence), 1, sem="release")
            ticket = gl.atomic_add(progress + 1, 1, sem="relaxed")


@triton.jit(do_not_specialize=["heads", "tokens"])
def finish_kernel(
    grad, unit, out, heads, tokens, out_strides, factor,
    channels: tl.constexpr, D: tl.constexpr, K: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """out [B, H, T, channels] = factor * a gradient of K channels in register order; with NARROW times unit[0].

    One program for 64 tokens of a head: block + T / 64 * sequence.
    """
    blocks = tl.cdiv(tokens, 64)
    sequence = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    numbers = tl.arange(0, 64 * D)
    x = tl.load(grad + tl.program_id(0).to(tl.int64) * 64 * K + numbers, mask=numbers < 64 * K)
    if NARROW:
        factor *= tl.load(unit)
    # [8 channels, warp, row, pair, r or r + 8, channel]
    x = (x * factor).reshape([D // 8, 4, 8, 4, 2, 2]).permute(1, 4, 2, 0, 3, 5).reshape([64, D])
    rows = block * 64 + tl.arange(0, 64)
    columns = tl.arange(0, D)
    out += (sequence // heads).to(tl.int64) * out_strides[0] + (sequence % heads).to(tl.int64) * out_strides[1]
    pointers = out + rows.to(tl.int64)[:, None] * out_strides[2] + columns[None, :] * out_strides[3]
    tl.store(pointers, x.to(out.dtype.element_ty), mask=(rows < tokens)[:, None] & (columns < channels)[None, :])
