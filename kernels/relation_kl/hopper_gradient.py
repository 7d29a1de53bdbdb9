"""Gradients that several programs of the Hopper backward kernel add to: float32 in register order.

64 tokens lie as the 128 threads of a warpgroup hold them, [2, D / 16, 128, 4], which is half of the channels, 8 of its
channels, a thread, and this thread's 2 x 2 numbers of tokens r and r + 8 and of neighbouring channels. So each thread
puts 16 bytes beside those of the thread before it into shared memory, and TMA reads 16 KiB in a row. `tend`, beside the
computation, or `finish_kernel`, after it, bring them into order.
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
def added_but_last():
    """Wait until what this thread has sent is added, but for the last `send`; `tma.store_wait` waits only until it is
    read."""
    gl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 2; mov.b32 $0, $1;", "=r,r", [gl.to_tensor(0)], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def all_added():
    """Wait until all that this thread has sent is added."""
    gl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0; mov.b32 $0, $1;", "=r,r", [gl.to_tensor(0)], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def wait_zeroed(zeroed, blocks):
    """Wait until all blocks of a gradient are 0, by their counter."""
    gl.inline_asm_elementwise(
        "{ .reg .pred done; .reg .b32 count; waitLoop: ld.acquire.gpu.global.b32 count, [$1];"
        "setp.ge.s32 done, count, $2; @!done bra waitLoop; mov.b32 $0, count; }",
        "=r,l,r", [zeroed.to(gl.int64, bitcast=True), blocks], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def tend(
    sums, out, unit, progress, sequences, rows_of_keys, lead, own_tiles, items, tokens, factor,
    channels: gl.constexpr, D: gl.constexpr, NARROW: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Beside those who compute: set gradients to 0 before they are added to, and finish those that are complete.

    Nobody waits here: each program's warps take blocks of 64 tokens by tickets, one to be set to 0 and one to be
    finished, in the order in which the row tiles come by, and look at both in turn. What is not complete when all row
    tiles have been handed out is left to `finish_kernel`.

    Args:
        sums: float32, the gradients in register order, in device memory; anything at first.
        out: [sequences, tokens, channels], what is finished: factor times the sums, with NARROW times unit[0].
        progress: int32 [4 + 2 * sequences], 0 at first: how many row tiles have been handed out; tickets for blocks to
            be set to 0, and to be finished; how many blocks, the last ones, are left; for each sequence, how many
            blocks are 0; and how many row tiles have added all they had.
        sequences: of keys.
        rows_of_keys: sequences of rows that share one of keys.
        lead: sequences of rows that are handed out together; gradients are set to 0 that much ahead.
        own_tiles: row tiles of a sequence.
        items: row tiles in all.
        tokens: of a sequence.
    """
    # By thread: its 2 tokens, r and r + 8, and 2 neighbouring channels
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 2, 2], [32, 1, 1], [WARPS, 1, 1], [2, 1, 0])
    THREADS: gl.constexpr = 32 * WARPS
    thread = gl.arange(0, THREADS, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
    pair = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
    channel = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    offsets = thread * 4 + pair * 2 + channel
    blocks = gl.cdiv(tokens, 64)
    total = sequences * blocks
    scale = gl.to_tensor(factor)
    if NARROW:
        scale *= gl.load(unit)
    to_zero = gl.atomic_add(progress + 1, 1)
    to_finish = gl.atomic_add(progress + 2, 1)
    going = total > 0
    while going:
        zeroing = to_zero // blocks
        handed = gl.atomic_add(progress, 0, sem="relaxed")
        # Further ahead they would leave the cache before they are added to.
        due = (to_zero < total) & (handed >= (zeroing * rows_of_keys // lead - 1) * lead * own_tiles)
        finishing = to_finish // blocks
        waiting = to_finish < total
        added = gl.atomic_add(progress + (4 + sequences + finishing), 0, mask=waiting, sem="acquire")
        complete = waiting & (added == own_tiles * rows_of_keys)
        if due | complete:
            place = sums + to_zero.to(gl.int64) * 64 * D + offsets
            for i in gl.static_range(16 * D // THREADS):
                zeros = gl.zeros([THREADS, 2, 2], gl.float32, LAYOUT)
                gl.store(place + i * 4 * THREADS, zeros, mask=due & (channel < 2))
            barrier()
            gl.atomic_add(progress + (4 + zeroing), 1, mask=due, sem="release")
            following = gl.atomic_add(progress + 1, 1, mask=due)
            to_zero = gl.where(due, following, to_zero)

            place = sums + to_finish.to(gl.int64) * 64 * D + offsets
            token = to_finish % blocks * 64 + thread // 32 * 16 + thread % 32 // 4 + pair * 8
            pointers = out + (finishing.to(gl.int64) * tokens + token) * channels + thread % 4 * 2 + channel
            upper = complete & (token < tokens) & (channel < 2)
            lower = complete & (token + 32 < tokens) & (channel < 2)
            for i in gl.static_range(channels // 8):
                x = gl.load(place + i * 512, mask=upper, cache_modifier=".cg")
                y = gl.load(place + (i * 512 + 256), mask=lower, cache_modifier=".cg")
                gl.store(pointers + i * 8, (x * scale).to(out.dtype.element_ty), mask=upper)
                gl.store(pointers + (i * 8 + 32 * channels), (y * scale).to(out.dtype.element_ty), mask=lower)
            following = gl.atomic_add(progress + 2, 1, mask=complete)
            to_finish = gl.where(complete, following, to_finish)
        gl.inline_asm_elementwise(
            "nanosleep.u32 $1; mov.b32 $0, $1;", "=r,r", [gl.where(due | complete, 0, 4000)],
            dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        going = (to_zero < total) | ((to_finish < total) & (complete | (handed < items)))
    gl.atomic_max(progress + 3, total - to_finish, mask=to_finish < total)


@triton.jit(do_not_specialize=["heads", "tokens"])
def finish_kernel(
    grad, unit, out, left, heads, tokens, out_strides, factor,
    channels: tl.constexpr, D: tl.constexpr, NARROW: tl.constexpr, LEFT: tl.constexpr,
):  # fmt: skip
    """out [B, H, T, channels] = factor * a gradient in register order; with NARROW times unit[0].

    One program for 64 tokens of a head: block + T / 64 * sequence. With LEFT only the last left[0] of them work.
    """
    if LEFT:  # noqa: SIM102 - the other one is for the compiler
        if tl.program_id(0) < tl.num_programs(0) - tl.load(left):
            return
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
