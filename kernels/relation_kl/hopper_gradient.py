"""Gradients that several programs of the Hopper backward kernel add to: float32 in register order.

64 tokens lie as the 128 threads of a warpgroup hold them, [2, D / 16, 128, 4], which is half of the channels, 8 of its
channels, a thread, and this thread's 2 x 2 numbers of tokens r and r + 8 and of neighbouring channels. So each thread
puts 16 bytes beside those of the thread before it into shared memory, and TMA reads 16 KiB in a row. `finish_kernel`
brings them into order.
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
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from .hopper_common import barrier


@builtin
def _reduce_add(descriptor, coordinates, source, _semantic: Any = None):
    """Add a tile of shared memory to device memory, asynchronously. Gluon has no name for it, but Triton's builder."""
    coordinates = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, descriptor.handle, coordinates, source.handle)


@gluon.jit
def in_register_order(x):
    """An accumulator [64, D] as its two halves of channels [D / 8, 256] in register order."""
    D: gl.constexpr = x.shape[1]
    # [warp, r or r + 8, row, half, 8 channels, pair, channel]
    x = x.reshape([4, 2, 8, 2, D // 16, 4, 2]).permute(3, 4, 0, 2, 5, 1, 6)
    return x.reshape([2, D // 8, 256]).permute(1, 2, 0).split()


@gluon.jit
def add_up(x, descriptor, batch, head, block, left, right):
    """Add 64 tokens [64, D] to a gradient in register order; left and right are buffers for half of it each."""
    D: gl.constexpr = x.shape[1]
    first, second = in_register_order(x)
    left.reshape([D // 8, 256]).store(first)
    right.reshape([D // 8, 256]).store(second)
    send(descriptor, batch, head, block, left, right, D)


@gluon.jit
def send(descriptor, batch, head, block, left, right, D: gl.constexpr):
    fence_async_shared()
    barrier()
    _reduce_add(descriptor, [batch, head, block * (D // 4), 0], left)
    _reduce_add(descriptor, [batch, head, block * (D // 4) + D // 8, 0], right)


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
def set_to_zero(sums, progress, sequences, own_tiles, tokens, D: gl.constexpr, WARPS: gl.constexpr):
    """Set gradients to 0 beside those who compute, in the order in which the row tiles come by.

    Each program's warps take tiles of 128 tokens by tickets until there are none left; they wait for nobody.

    Args:
        sums: float32, the gradients in register order, in device memory; anything at first.
        progress: see `hopper_backward.backward_kernel`.
        sequences: of keys.
        own_tiles: tiles of a sequence.
        tokens: of a sequence.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])
    AT_ONCE: gl.constexpr = 128 * WARPS
    numbers = gl.arange(0, AT_ONCE, LAYOUT)
    blocks = gl.cdiv(tokens, 64)
    ticket = gl.atomic_add(progress + 1, 1, sem="relaxed")
    # Not compared with the product of both: it would be kept in a register for the whole kernel.
    while ticket // own_tiles < sequences:
        sequence = ticket // own_tiles
        block = ticket % own_tiles * 2
        place = sums + (sequence * blocks + block).to(gl.int64) * 64 * D + numbers
        for i in gl.static_range(128 * D // AT_ONCE):
            # The last tile may be of 64 tokens.
            inside = (block + i * AT_ONCE // (64 * D) < blocks) & (numbers >= 0)
            gl.store(place + i * AT_ONCE, gl.zeros([AT_ONCE], gl.float32, LAYOUT), mask=inside)
        barrier()
        gl.atomic_add(progress + (2 + sequence), 1, sem="release")
        ticket = gl.atomic_add(progress + 1, 1, sem="relaxed")


@triton.jit(do_not_specialize=["heads", "tokens"])
def finish_kernel(
    grad, unit, out, heads, tokens, out_strides, factor, channels: tl.constexpr, D: tl.constexpr, NARROW: tl.constexpr
):  # fmt: skip
    """out [B, H, T, channels] = factor * a gradient in register order; with NARROW times unit[0].

    One program for 64 tokens of a head: block + T / 64 * sequence.
    """
    blocks = tl.cdiv(tokens, 64)
    sequence = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    x = tl.load(grad + tl.program_id(0).to(tl.int64) * 64 * D + tl.arange(0, 64 * D))
    if NARROW:
        factor *= tl.load(unit)
    # [half, 8 channels, warp, row, pair, r or r + 8, channel]
    x = (x * factor).reshape([2, D // 16, 4, 8, 4, 2, 2]).permute(2, 5, 3, 0, 1, 4, 6).reshape([64, D])
    rows = block * 64 + tl.arange(0, 64)
    columns = tl.arange(0, D)
    out += (sequence // heads).to(tl.int64) * out_strides[0] + (sequence % heads).to(tl.int64) * out_strides[1]
    pointers = out + rows.to(tl.int64)[:, None] * out_strides[2] + columns[None, :] * out_strides[3]
    tl.store(pointers, x.to(out.dtype.element_ty), mask=(rows < tokens)[:, None] & (columns < channels)[None, :])
