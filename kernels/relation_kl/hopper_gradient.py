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
