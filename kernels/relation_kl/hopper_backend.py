"""Launches the Hopper kernels: TMA descriptors, statistics, the gradient's buffer. Nothing here waits for the GPU."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .hopper_backward import backward_kernel
from .hopper_forward import forward_kernel
from .tiles import HOPPER_ROWS, Pipeline
from .torch_backend import Operands

_LOG2_E = 1.4426950408889634
_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}
_HALF = HOPPER_ROWS // 2
# Programs have 4 warps to begin with; the kernels call for the others. Fused multiply-adds do no harm here: those
# whose rounding matters are written out, and what must cancel is computed alike for student and teacher.
_OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": True}


def can_fetch(operands: Operands) -> bool:
    """Whether TMA can read all four: channels side by side, everything else at multiples of 16 bytes."""
    tensors = operands.student_q, operands.student_k, operands.teacher_q, operands.teacher_k
    return all(_fetchable(x) for x in tensors)


def forward(
    operands: Operands, softmax_scale: float, pipeline: Pipeline, segments: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, both statistics of backward, and flags of the row tiles that must be done again because a sum overflowed.

    Args:
        operands: bf16 or fp16, for which `can_fetch` holds.
        softmax_scale: factor of the logits.
        pipeline: from `tiles.pick_pipeline`.
        segments: ids, contiguous, and `tile_bounds(ids, 128, pipeline.block_n)`; or None.

    Returns:
        kl, sum_s, sum_t: float32 [B, H, T]; flags: int32 [B, H, row tiles, 2],
        non-zero for the halves of row tiles to be done again.
    """
    q, k = operands.student_q, operands.student_k
    batch, heads, seq_len, _ = q.shape
    tiles = -(-seq_len // HOPPER_ROWS)
    kl, sum_s, sum_t = (torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) for _ in range(3))
    flags = torch.empty(batch, heads, tiles, 2, dtype=torch.int32, device=q.device)
    names, bounds = segments or (flags, flags)
    launch: Any = forward_kernel[(tiles * batch * heads,)]
    launch(
        *_descriptors(operands, pipeline),
        names,
        bounds,
        kl,
        sum_s,
        sum_t,
        flags,
        heads,
        heads // k.shape[1],
        seq_len,
        softmax_scale * _LOG2_E,
        **{"N": pipeline.block_n, "D": pipeline.block_d, "K": pipeline.block_k, "SLOTS": pipeline.slots},
        **{"SEGMENTS": segments is not None},
        **_OPTIONS,
    )
    return kl, sum_s, sum_t, flags


def backward(
    operands: Operands,
    softmax_scale: float,
    pipeline: Pipeline,
    segments: tuple[Tensor, Tensor] | None,
    sum_s: Tensor,
    sum_t: Tensor,
    row_grad: Tensor,
    unit: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of student_q and student_k; for a self-relation their sum, and None.

    Contributions to a key's gradient are added up in float32 in the order in which they come: from run to run
    the last bits differ.

    Args:
        operands: as for `forward`.
        softmax_scale: as for `forward`.
        pipeline: as for `forward`.
        segments: as for `forward`.
        sum_s: from `forward`.
        sum_t: from `forward`.
        row_grad: float32 [B, H, T], contiguous, in units of `unit`; padding may hold anything.
        unit: float32 [1], or None for 1.
    """
    q, k = operands.student_q, operands.student_k
    batch, heads, seq_len, channels = q.shape
    tiles = -(-seq_len // HOPPER_ROWS)
    key_grad = torch.zeros(k.shape, dtype=torch.float32, device=k.device)
    grad = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    names, bounds = segments or (sum_s, sum_s)
    launch: Any = backward_kernel[(tiles * batch * heads,)]
    launch(
        *_descriptors(operands, pipeline),
        names,
        bounds,
        sum_s,
        sum_t,
        row_grad,
        sum_s if unit is None else unit,
        _descriptor(key_grad, _HALF, pipeline.block_d // 2),
        grad,
        heads,
        heads // k.shape[1],
        seq_len,
        channels,
        softmax_scale * _LOG2_E,
        softmax_scale,
        **{"N": pipeline.block_n, "D": pipeline.block_d, "K": pipeline.block_k, "SEGMENTS": segments is not None},
        **{"SELF": operands.self_relation, "NARROW": unit is not None},
        **_OPTIONS,
    )
    factor = softmax_scale if unit is None else unit * softmax_scale
    if operands.self_relation:
        return torch.mul(key_grad, factor, out=grad), None
    return grad, torch.mul(key_grad, factor, out=torch.empty(k.shape, dtype=k.dtype, device=k.device))


def _descriptors(operands: Operands, pipeline: Pipeline) -> tuple[TensorDescriptor, ...]:
    """Of student_q, student_k, teacher_q and teacher_k, as both kernels take them."""
    q, k = (_HALF, pipeline.block_d), (pipeline.block_n, pipeline.block_d)
    return (
        _descriptor(operands.student_q, *q),
        _descriptor(operands.student_k, *k),
        _descriptor(operands.teacher_q, *q),
        _descriptor(operands.teacher_k, *k),
    )


def _descriptor(x: Tensor, tokens: int, channels: int) -> TensorDescriptor:
    """Of x [B, H, T, D] in blocks [1, 1, tokens, channels]; what lies beyond T and D reads as 0."""
    block = [1, 1, tokens, channels]
    # The stride of a dimension of 1 is never used, but TMA wants it at a multiple of 16 bytes too.
    strides = [stride if size > 1 else 64 for size, stride in zip(x.shape, x.stride(), strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides[:3], 1], block, _layout(tokens, channels, x.dtype))


@lru_cache
def _layout(tokens: int, channels: int, dtype: torch.dtype) -> Any:
    return gl.NVMMASharedLayout.get_default_for([1, 1, tokens, channels], _TYPES[dtype])


def _fetchable(x: Tensor) -> bool:
    unit = 16 // x.element_size()
    outer = zip(x.shape[:3], x.stride()[:3], strict=True)
    aligned = all(size == 1 or (stride > 0 and stride % unit == 0) for size, stride in outer)
    return aligned and (x.stride(3) == 1 or x.shape[3] == 1) and x.data_ptr() % 16 == 0
