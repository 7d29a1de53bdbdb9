"""Launches the Hopper kernels for 129 to 256 channels, and backward of deterministic mode. Nothing here waits for the
GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .hopper_backend import LOG2_E, OPTIONS, descriptor, multiprocessors
from .hopper_wide_backward import wide_backward_kernel
from .hopper_wide_forward import wide_forward_kernel
from .launch import launch
from .tiles import HOPPER_ROWS, WidePipeline, grid
from .torch_backend import Operands


def forward(
    operands: Operands, softmax_scale: float, pipeline: WidePipeline, segments: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Rows and the statistics of `triton_backend.forward`, those of the general kernels.

    Args:
        operands: bf16 or fp16, for which `hopper_backend.can_fetch` holds.
        softmax_scale: factor of the logits.
        pipeline: from `tiles.pick_wide_pipeline`.
        segments: ids, contiguous, and `tile_bounds(ids, 128, pipeline.forward_n)`; or None.
    """
    q, k = operands.student_q, operands.student_k
    batch, heads, seq_len, _ = q.shape
    keys = pipeline.forward_n, pipeline.forward_c
    kl, *statistics = (torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) for _ in range(5))
    launch(
        wide_forward_kernel,
        grid(-(-seq_len // HOPPER_ROWS), batch * heads, multiprocessors(q.device)),
        descriptor(q, HOPPER_ROWS // 2, pipeline.block_d),
        descriptor(k, *keys),
        descriptor(operands.teacher_q, HOPPER_ROWS // 2, pipeline.block_d),
        descriptor(operands.teacher_k, *keys),
        *(segments or (kl, kl)),
        kl,
        *statistics,
        heads,
        heads // k.shape[1],
        seq_len,
        softmax_scale * LOG2_E,
        **{"N": pipeline.forward_n, "D": pipeline.block_d, "C": pipeline.forward_c, "K": pipeline.block_k},
        **{"SLOTS": pipeline.slots, "SEGMENTS": segments is not None},
        **OPTIONS,
    )
    return kl, tuple(statistics)


def backward(
    operands: Operands,
    softmax_scale: float,
    pipeline: WidePipeline,
    segments: tuple[Tensor, Tensor] | None,
    statistics: tuple[Tensor, ...],
    row_grad: Tensor,
    unit: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of student_q and student_k; for a self-relation their sum, and None.

    Args:
        operands: as for `forward`.
        softmax_scale: as for `forward`.
        pipeline: as for `forward`.
        segments: ids, contiguous, and `tile_bounds(ids, 128, pipeline.backward_n)`; or None.
        statistics: as from `forward`, but any pivot may be in the place of a row's maximum.
        row_grad: float32 [B, H, T], contiguous, in units of `unit`; padding may hold anything.
        unit: float32 [1], or None for 1.
    """
    max_s, max_t, inverse_s, inverse_t = statistics
    # Then what the kernel calls -r and -g / l_t; padding may hold anything.
    combined = torch.stack((max_s, max_t, -inverse_s / inverse_t, -row_grad * inverse_t))
    q = operands.student_q, operands.teacher_q
    k = operands.student_k, operands.teacher_k

    def gradient(own: tuple[Tensor, Tensor], others: tuple[Tensor, Tensor], below: bool, above: bool) -> Tensor:
        batch, heads, seq_len, channels = own[0].shape
        group = heads // others[0].shape[1] if below else others[0].shape[1] // heads
        grad = torch.empty(own[0].shape, dtype=own[0].dtype, device=own[0].device)
        blocks = (HOPPER_ROWS // 2, pipeline.backward_n) * 2
        tensors = own[0], others[0], own[1], others[1]
        launch(
            wide_backward_kernel,
            grid(-(-seq_len // HOPPER_ROWS), batch * heads, multiprocessors(grad.device)),
            *(descriptor(x, tokens, pipeline.block_d) for x, tokens in zip(tensors, blocks, strict=True)),
            *(segments or (row_grad, row_grad)),
            combined,
            row_grad.numel(),
            row_grad if unit is None else unit,
            grad,
            heads,
            group,
            seq_len,
            channels,
            softmax_scale * LOG2_E,
            softmax_scale,
            **{
                "N": pipeline.backward_n,
                "D": pipeline.block_d,
                "K": pipeline.block_k,
                "SEGMENTS": segments is not None,
            },
            **{"BELOW": below, "ABOVE": above, "NARROW": unit is not None},
            **OPTIONS,
        )
        return grad

    if operands.self_relation:
        return gradient(q, q, below=True, above=True), None
    return gradient(q, k, below=True, above=False), gradient(k, q, below=False, above=True)
