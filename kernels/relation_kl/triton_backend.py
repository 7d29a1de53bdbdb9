"""Launches the Triton kernels: grids, tile sizes, statistics. Nothing here waits for the GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from .launch import launch
from .segment_kernels import starts_and_bounds, tile_bounds
from .tiles import (
    HOPPER_BLOCK,
    HOPPER_ROWS,
    Pipeline,
    Tile,
    Tiles,
    WidePipeline,
    pad_head_dim,
    pick_pipeline,
    pick_tiles,
    pick_wide_pipeline,
)
from .torch_backend import Operands
from .triton_kernels import backward_kernel, forward_again_kernel, forward_kernel

# TRITON_INTERPRET is read where a kernel is defined: for Triton's own functions, when triton is imported. Set in
# between, it would interpret our kernels and not those.
INTERPRETING = isinstance(forward_kernel, InterpretedFunction) and isinstance(tl.sum, InterpretedFunction)

# The Hopper kernels are written in Gluon as Triton has it from 3.6 on.
_HAS_GLUON = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)
# fp16 loses weights below 6e-8; they are 2 at most, and its largest number is 65504.
BOOST = 2.0**14
# Programs that look for flagged row tiles, of which there is none as a rule: about two a multiprocessor.
PROGRAMS_AGAIN = 264
LOG2_E = 1.4426950408889634
_DOT = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def forward(operands: Operands, softmax_scale: float, segment_ids: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Rows [B, H, T], and what backward wants, float32 [B, H, T] each.

    From the general kernels, and from the Hopper ones for more than 128 channels, that is the maximum of each row's
    logits, of student and of teacher, in units of log 2, and 1 / sum of the exponentials, of both; from the other
    Hopper ones see `triton_kernels.relative_sum`, of both; with segment_ids those hand on what backward needs, too,
    int32 (`segment_kernels.starts_and_bounds`). In deterministic mode it is the former, but for any pivot in the place
    of the maximum.
    """
    q, k = operands.student_q, operands.student_k
    batch, heads, seq_len, _ = q.shape
    names = _names(segment_ids)
    pipeline = pipeline_of(operands)
    if pipeline is not None:
        from . import hopper_backend

        rows = None if names is None else starts_and_bounds(names, HOPPER_BLOCK, HOPPER_BLOCK)
        own = None
        if torch.are_deterministic_algorithms_enabled():
            own = q.new_empty(q.shape[:3], dtype=torch.float32), q.new_empty(q.shape[:3], dtype=torch.float32)
        with on_device_of(q):
            kl, sum_s, sum_t, flags = hopper_backend.forward(operands, softmax_scale, pipeline, rows, own)
        segments = None if names is None or rows is None else (names, rows[1])
        forward_again(operands, softmax_scale, segments, flags, kl, sum_s, sum_t)
        if own is not None:
            return kl, absolute(sum_s, sum_t, *own)
        return kl, (sum_s, sum_t, *(rows or ()))

    wide = wide_pipeline_of(operands)
    if wide is not None:
        from . import hopper_wide_backend

        segments = _segments(names, HOPPER_ROWS, wide.forward_n)
        with on_device_of(q):
            return hopper_wide_backend.forward(operands, softmax_scale, wide, segments)

    tile = tiles_of(q).forward
    segments = _segments(names, tile.block_m, tile.block_n)
    kl, *statistics = (torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) for _ in range(5))
    with on_device_of(q):
        launch(
            forward_kernel,
            -(-seq_len // tile.block_m) * batch * heads,
            *tensors_and_strides(operands),
            *(segments or (q, q)),
            kl,
            *statistics,
            heads,
            heads // k.shape[1],
            seq_len,
            0,
            seq_len,
            softmax_scale * LOG2_E,
            VISIT=False,
            **constants(q, segments, tile),
        )
    return kl, tuple(statistics)


def forward_again(
    operands: Operands,
    softmax_scale: float,
    segments: tuple[Tensor, Tensor] | None,
    flags: Tensor,
    kl: Tensor,
    sum_s: Tensor,
    sum_t: Tensor,
) -> None:
    """Do flagged row tiles of 64 rows again, with a running maximum, over the results of the Hopper kernel.

    Args:
        operands: 16-bit, 128 channels at most.
        softmax_scale: as for `forward`.
        segments: ids, and bounds of tiles of 64 rows; or None.
        flags: int32 [B, H, row tiles of 128, 2], of 64 rows each; where one is 0 those are left alone.
        kl: float32 [B, H, T], contiguous.
        sum_s: float32 [B, H, T], contiguous; see `triton_kernels.relative_sum`.
        sum_t: as sum_s.
    """
    q, k = operands.student_q, operands.student_k
    tile = replace(tiles_of(q).forward, block_m=HOPPER_BLOCK)
    count = flags.numel()
    with on_device_of(q):
        launch(
            forward_again_kernel,
            min(count, PROGRAMS_AGAIN),
            *tensors_and_strides(operands),
            *(segments or (q, q)),
            flags,
            kl,
            *(sum_s, sum_t) * 2,
            count,
            q.shape[1],
            q.shape[1] // k.shape[1],
            q.shape[2],
            0,
            q.shape[2],
            softmax_scale * LOG2_E,
            VISIT=False,
            **constants(q, segments, tile),
        )


def backward(
    operands: Operands,
    softmax_scale: float,
    segment_ids: Tensor | None,
    statistics: Sequence[Tensor],
    row_grad: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of student_q and student_k; for a self-relation their sum, and None.

    Up to 128 channels, what follows the Hopper forward kernel is the Hopper backward kernel, or in deterministic mode,
    by the statistics, the one for more channels: it writes each number once.
    """
    q = operands.student_q, operands.teacher_q
    k = operands.student_k, operands.teacher_k
    g = row_grad.float()
    unit = None
    narrow = q[0].dtype == torch.float16
    if narrow:
        if segment_ids is not None:
            g = torch.where(segment_ids[:, None] >= 0, g, 0.0)
        unit = unit_of(g.abs().amax())
        g = g / unit
    g = g.contiguous()
    names = _names(segment_ids)
    wide = wide_pipeline_of(operands)
    of_hopper = len(statistics) == 2 or statistics[2].dtype == torch.int32
    if unit is not None and (wide is not None or of_hopper):  # the general kernels do it themselves
        g, unit = g * BOOST, unit / BOOST
    if of_hopper:
        from . import hopper_backend

        pipeline = pick(q[0])
        assert pipeline is not None
        sum_s, sum_t, *rows = statistics
        segments = None if names is None else (names, rows[0], rows[1])
        with on_device_of(q[0]):
            return hopper_backend.backward(operands, softmax_scale, pipeline, segments, sum_s, sum_t, g, unit)
    if wide is not None:
        from . import hopper_wide_backend

        segments = _segments(names, HOPPER_ROWS, wide.backward_n)
        with on_device_of(q[0]):
            return hopper_wide_backend.backward(operands, softmax_scale, wide, segments, tuple(statistics), g, unit)
    tile = tiles_of(q[0]).backward
    segments = _segments(names, tile.block_m, tile.block_n)

    def gradient(own: tuple[Tensor, Tensor], others: tuple[Tensor, Tensor], below: bool, above: bool) -> Tensor:
        x_s, x_t = own
        y_s, y_t = others
        batch, heads, seq_len, _ = x_s.shape
        # As queries, `heads // y heads` of ours share one head of theirs; as keys it is the other way round.
        group = heads // y_s.shape[1] if below else y_s.shape[1] // heads
        grad = torch.empty_like(x_s)
        with on_device_of(x_s):
            launch(
                backward_kernel,
                -(-seq_len // tile.block_m) * batch * heads,
                x_s,
                x_t,
                y_s,
                y_t,
                x_s.stride(),
                x_t.stride(),
                y_s.stride(),
                y_t.stride(),
                *(segments or (x_s, x_s)),
                *statistics,
                g,
                g if unit is None else unit,
                grad,
                grad.stride(),
                heads,
                group,
                seq_len,
                0,
                seq_len,
                softmax_scale * LOG2_E,
                softmax_scale,
                **{"BELOW": below, "ABOVE": above, "NARROW": narrow, "VISIT": False},
                **constants(x_s, segments, tile),
            )
        return grad

    if operands.self_relation:
        return gradient(q, q, below=True, above=True), None
    return gradient(q, k, below=True, above=False), gradient(k, q, below=False, above=True)


def value_and_grad(
    operands: Operands, softmax_scale: float, segment_ids: Tensor | None, row_grad: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows and both gradients. A row's gradient needs its whole lse first, so these are the two passes."""
    rows, statistics = forward(operands, softmax_scale, segment_ids)
    grad_q, grad_k = backward(operands, softmax_scale, segment_ids, statistics, row_grad)
    return rows, grad_q, grad_k


def unit_of(largest: Tensor) -> Tensor:
    """A power of two at or above the largest |g|, both float32 [].

    With g / unit at most 1 the weights keep clear of fp16's limits, and dividing by it rounds nothing. On device, so
    that nobody waits for it.
    """
    exponent = torch.frexp(largest).exponent
    return torch.ldexp(torch.ones((), device=largest.device), exponent.clamp(min=-100))


def absolute(sum_s: Tensor, sum_t: Tensor, own_s: Tensor, own_t: Tensor) -> tuple[Tensor, ...]:
    """Pivots and 1 / sums from those relative to the own logit (`triton_kernels.relative_sum`)."""
    pivots = (own - total.clamp(max=0) for own, total in ((own_s, sum_s), (own_t, sum_t)))
    inverses = (torch.where(total > 0, 1 / total, 1.0) for total in (sum_s, sum_t))
    return *pivots, *inverses


def pipeline_of(operands: Operands) -> Pipeline | None:
    """The shapes of the Hopper kernels for 128 channels at most, or None where others are to run."""
    pipeline = pick(operands.student_q)
    return pipeline if pipeline is not None and _can_fetch(operands) else None


def wide_pipeline_of(operands: Operands) -> WidePipeline | None:
    """The shapes of the Hopper kernels whose results are equal bit for bit from run to run, or None where others are to
    run."""
    x = operands.student_q
    pipeline = pick_wide_pipeline(_architecture(x.device), x.shape[3], x.element_size()) if _HAS_GLUON else None
    return pipeline if pipeline is not None and _can_fetch(operands) else None


def pick(x: Tensor) -> Pipeline | None:
    """The shapes of the Hopper kernels for 128 channels at most, or None where GPU, type, head_dim or Triton's version
    want others."""
    return pick_pipeline(_architecture(x.device), x.shape[3], x.element_size()) if _HAS_GLUON else None


def _can_fetch(operands: Operands) -> bool:
    from . import hopper_backend

    return hopper_backend.can_fetch(operands)


def tensors_and_strides(operands: Operands) -> tuple[Any, ...]:
    tensors = operands.student_q, operands.student_k, operands.teacher_q, operands.teacher_k
    return *tensors, *(x.stride() for x in tensors)


def tiles_of(x: Tensor) -> Tiles:
    return pick_tiles(_architecture(x.device), x.shape[3], x.element_size())


@lru_cache
def _architecture(device: torch.device) -> str:
    if INTERPRETING:
        return "interpreter"
    if torch.version.hip is not None:
        return "hip"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def on_device_of(x: Tensor) -> Any:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device_of(x)


def _names(segment_ids: Tensor | None) -> Tensor | None:
    """The ids as the kernels read them, as a rule the very tensor: signed, of 32 or 64 bits, contiguous."""
    if segment_ids is None:
        return None
    if segment_ids.dtype not in (torch.int32, torch.int64):
        segment_ids = segment_ids.long()
    return segment_ids.contiguous()


def _segments(names: Tensor | None, block_m: int, block_n: int) -> tuple[Tensor, Tensor] | None:
    """The tokens' names [B, T] and the tiles' bounds [B, tiles, 5]."""
    return None if names is None else (names, tile_bounds(names, block_m, block_n))


def constants(x: Tensor, segments: tuple[Tensor, Tensor] | None, tile: Tile) -> dict[str, Any]:
    # bf16 products are wrong in Triton's interpreter; fp32 ones are exact on bf16 inputs.
    dot = tl.float32 if INTERPRETING else _DOT[x.dtype]
    return {
        "HEAD_DIM": x.shape[3],
        "BLOCK_D": pad_head_dim(x.shape[3]),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "SEGMENTS": segments is not None,
        "DOT": dot,
        "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        # A product fused into a difference is rounded on one side only: equal probabilities would not cancel, and
        # a logit would differ between forward, where it is rounded for the maximum, and backward.
        "enable_fp_fusion": False,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
