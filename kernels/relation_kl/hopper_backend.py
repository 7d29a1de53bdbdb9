"""Launches the Hopper kernels: TMA descriptors, statistics, the gradient's buffer. Nothing here waits for the GPU."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .hopper_backward import backward_kernel
from .hopper_forward import REGISTERS, forward_kernel
from .hopper_gradient import finish_kernel
from .launch import launch
from .tiles import BACKWARD_TOGETHER, FORWARD_TOGETHER, HOPPER_BLOCK, HOPPER_ROWS, Pipeline, divide_last_wave, grid
from .torch_backend import Operands
from .torch_visit import Visit

if TYPE_CHECKING:
    from .triton_visit import Places

LOG2_E = 1.4426950408889634
_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
# Programs have 4 warps to begin with; the kernels call for the others. Fused multiply-adds do no harm here: those
# whose rounding matters are written out, and what must cancel is computed alike for student and teacher.
OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": True}
_FORWARD_OPTIONS = OPTIONS | {"maxnreg": REGISTERS}


def can_fetch(operands: Operands) -> bool:
    """Whether TMA can read all four."""
    keys = () if operands.self_relation else (operands.student_k, operands.teacher_k)
    return all(fetchable(x) for x in (operands.student_q, operands.teacher_q, *keys))


def fetchable(x: Tensor) -> bool:
    """Whether TMA can read x [B, H, T, D]: channels side by side, everything else at multiples of 16 bytes."""
    return x.data_ptr() % 16 == 0 and _strides_fit(x.shape, x.stride(), x.element_size())


def forward(
    operands: Operands,
    softmax_scale: float,
    pipeline: Pipeline,
    of_rows: tuple[Tensor, Tensor] | None,
    own: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, both statistics of backward, and flags of the row tiles that must be done again: where a sum overflowed, or
    what they see is no run of keys.

    Args:
        operands: bf16 or fp16, for which `can_fetch` holds.
        softmax_scale: factor of the logits.
        pipeline: from `tiles.pick_pipeline`.
        of_rows: `segment_kernels.starts_and_bounds(ids, 64, 64)`; or None.
        own: float32 [B, H, T] for the rows' logits with their own keys, in units of log 2, of both; or None.

    Returns:
        kl, sum_s, sum_t: float32 [B, H, T]; flags: int32 [B, H, row tiles, 2],
        non-zero for the halves of row tiles to be done again.
    """
    q, k = operands.student_q, operands.student_k
    batch, heads, seq_len, _ = q.shape
    tiles = -(-seq_len // HOPPER_ROWS)
    kl = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    sum_s, sum_t = torch.empty_like(kl), torch.empty_like(kl)
    flags = torch.empty(batch, heads, tiles, 2, dtype=torch.int32, device=q.device)
    launch(
        forward_kernel,
        grid(tiles, batch * heads, 2 * multiprocessors(q.device), FORWARD_TOGETHER),
        *descriptors(operands, pipeline.block_d),
        *(of_rows or (flags, flags)),
        kl,
        *(own or (kl, kl)),
        sum_s,
        sum_t,
        flags,
        heads,
        heads // k.shape[1],
        seq_len,
        0,
        seq_len,
        softmax_scale * LOG2_E,
        **{"D": pipeline.block_d, "K": pipeline.block_k, "SLOTS": pipeline.slots},
        **{"SEGMENTS": of_rows is not None, "VISIT": False, "OWN": own is not None},
        **_FORWARD_OPTIONS,
    )
    return kl, sum_s, sum_t, flags


def backward(
    operands: Operands,
    softmax_scale: float,
    pipeline: Pipeline,
    segments: tuple[Tensor, Tensor, Tensor] | None,
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
        segments: ids, contiguous, with starts and bounds as for `forward`; or None.
        sum_s: from `forward`.
        sum_t: from `forward`.
        row_grad: float32 [B, H, T], contiguous, in units of `unit`; padding may hold anything.
        unit: float32 [1], or None for 1.
    """
    q, k = operands.student_q, operands.student_k
    batch, heads, seq_len, channels = q.shape
    tiles = -(-seq_len // (HOPPER_BLOCK * pipeline.parts))
    key_grad = torch.empty(gradient_shape(k, pipeline), dtype=torch.float32, device=k.device)
    grad = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    of_keys = None if operands.self_relation else torch.empty(k.shape, dtype=k.dtype, device=k.device)
    together = grid(tiles, batch * heads, multiprocessors(q.device), BACKWARD_TOGETHER)[0]
    sequences = batch * k.shape[1]
    progress = torch.zeros(2 + sequences, dtype=torch.int32, device=q.device)
    launch(
        backward_kernel,
        min(tiles * batch * heads, multiprocessors(q.device)),
        *descriptors(operands, pipeline.block_d),
        *(segments or (sum_s, sum_s, sum_s)),
        sum_s,
        sum_t,
        sum_s,
        sum_t,
        row_grad,
        sum_s if unit is None else unit,
        _gradient_descriptor(key_grad, pipeline),
        grad,
        key_grad,
        progress,
        heads,
        heads // k.shape[1],
        together,
        tiles,
        tiles * batch * heads,
        tiles * batch * heads,
        sequences,
        seq_len,
        0,
        seq_len,
        0,
        1,
        softmax_scale * LOG2_E,
        softmax_scale,
        channels=channels,
        **_backward_shapes(pipeline),
        **{"SEGMENTS": segments is not None, "SELF": operands.self_relation, "NARROW": unit is not None},
        **{"VISIT": False},
        **OPTIONS,
    )
    finish(key_grad, softmax_scale, unit, pipeline, grad if of_keys is None else of_keys)
    return grad, of_keys


def gradient_shape(x: Tensor, pipeline: Pipeline) -> tuple[int, ...]:
    """Of the float32 buffer in which the gradient of x [B, H, T, D] is added up, in register order."""
    batch, heads, tokens, _ = x.shape
    return batch, heads, -(-tokens // HOPPER_BLOCK), pipeline.block_k // 4, 256


def finish(grad: Tensor, factor: float, unit: Tensor | None, pipeline: Pipeline, out: Tensor) -> None:
    """Writes factor (times unit[0]) times a gradient in register order to out [B, H, T, D]."""
    batch, heads, tokens, channels = out.shape
    launch(
        finish_kernel,
        -(-tokens // HOPPER_BLOCK) * batch * heads,
        grad,
        grad if unit is None else unit,
        out,
        heads,
        tokens,
        out.stride(),
        factor,
        **{"channels": channels, "D": pipeline.block_d, "K": pipeline.block_k, "NARROW": unit is not None},
        num_warps=4,
    )


def forward_visit(
    visit: Visit,
    places: Places,
    softmax_scale: float,
    pipeline: Pipeline,
    of_rows: tuple[Tensor, Tensor] | None,
    pivots: tuple[Tensor, Tensor],
    sums: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """What `triton_visit.forward` asks for: adds to the sums, and returns flags as `forward` does. Where a flag of
    64 rows is not 0, theirs are as before.

    Args:
        visit: with tensors that are `fetchable`.
        places: of the visit.
        softmax_scale: factor of the logits.
        pipeline: as for `forward`.
        of_rows: `segment_kernels.starts_and_bounds` of the common sequence, or None.
        pivots: m_s and m_t, float32 [B, H, R].
        sums: l_s, l_t and a, float32 [B, H, R].
    """
    batch, heads, rows, _ = visit.q_s.shape
    tiles = -(-rows // HOPPER_ROWS)
    l_s, l_t, a = sums
    flags = torch.empty(batch, heads, tiles, 2, dtype=torch.int32, device=a.device)
    launch(
        forward_kernel,
        grid(tiles, batch * heads, 2 * multiprocessors(a.device), FORWARD_TOGETHER),
        *descriptors(Operands(visit.q_s, visit.k_s, visit.q_t, visit.k_t, False), pipeline.block_d),
        *(of_rows or (flags, flags)),
        a,
        *pivots,
        l_s,
        l_t,
        flags,
        heads,
        heads // visit.k_s.shape[1],
        places.seq_len,
        places.first_row,
        places.keys_end,
        softmax_scale * LOG2_E,
        **{"D": pipeline.block_d, "K": pipeline.block_k, "SLOTS": pipeline.slots},
        **{"SEGMENTS": of_rows is not None, "VISIT": True, "OWN": False},
        **_FORWARD_OPTIONS,
    )
    return flags


def backward_visit(
    visit: Visit,
    places: Places,
    softmax_scale: float,
    pipeline: Pipeline,
    segments: tuple[Tensor, Tensor, Tensor] | None,
    statistics: tuple[Tensor, ...],
    row_grad: Tensor,
    q_grad: Tensor,
    k_grad: Tensor,
) -> None:
    """What `triton_visit.backward` asks for: adds to q_grad and k_grad, in no fixed order.

    Args:
        visit: as for `forward_visit`.
        places: as for `forward_visit`.
        softmax_scale: factor of the logits; not of the gradients.
        pipeline: as for `forward`.
        segments: ids, starts and bounds of the common sequence, or None.
        statistics: m_s, m_t, l_s, l_t, float32 [B, H, R], contiguous.
        row_grad: float32 [B, H, R], contiguous.
        q_grad: of the rows, in register order (`gradient_shape`).
        k_grad: of the keys, in register order.
    """
    batch, heads, rows, channels = visit.q_s.shape
    own_tiles = -(-rows // (HOPPER_BLOCK * pipeline.parts))
    tiles = own_tiles * batch * heads
    whole, parts = tiles, 1
    if segments is None and not visit.diagonal:
        whole, parts = divide_last_wave(tiles, -(-places.keys_end // HOPPER_BLOCK), multiprocessors(k_grad.device))
    items = whole + (tiles - whole) * parts
    launch(
        backward_kernel,
        items,  # a piece each: between them the exchanges' kernels find multiprocessors
        *descriptors(Operands(visit.q_s, visit.k_s, visit.q_t, visit.k_t, False), pipeline.block_d),
        *(segments or (row_grad, row_grad, row_grad)),
        *statistics,
        row_grad,
        row_grad,
        _gradient_descriptor(k_grad, pipeline),
        _gradient_descriptor(q_grad, pipeline),
        k_grad,
        k_grad,
        heads,
        heads // visit.k_s.shape[1],
        1,
        own_tiles,
        items,
        1,
        0,
        places.seq_len,
        places.first_row,
        places.keys_end,
        whole,
        parts,
        softmax_scale * LOG2_E,
        1.0,
        channels=channels,
        **_backward_shapes(pipeline),
        **{"SEGMENTS": segments is not None, "SELF": False, "NARROW": False, "VISIT": True},
        **OPTIONS,
    )


@lru_cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":  # where kernels are only compiled
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def _backward_shapes(pipeline: Pipeline) -> dict[str, int]:
    of_vectors = {"D": pipeline.block_d, "K": pipeline.block_k, "PARTS": pipeline.parts}
    return of_vectors | {"SLOTS": pipeline.tile_slots, "STAGES": pipeline.grad_slots}


def descriptors(operands: Operands, channels: int) -> tuple[TensorDescriptor, ...]:
    """Of student_q, student_k, teacher_q and teacher_k, in blocks of 64 tokens."""
    tensors = operands.student_q, operands.student_k, operands.teacher_q, operands.teacher_k
    return tuple(descriptor(x, HOPPER_BLOCK, channels) for x in tensors)


def _gradient_descriptor(grad: Tensor, pipeline: Pipeline) -> TensorDescriptor:
    """Of a gradient in register order in blocks of half of block_d channels of 64 tokens; what lies beyond block_k is
    not written."""
    return descriptor(grad, pipeline.block_d // 8, 256)


def descriptor(x: Tensor, tokens: int, channels: int) -> TensorDescriptor:
    """Of x [..., T, D] in blocks [..., tokens, channels], 1 in the others; what lies beyond T and D reads as 0."""
    blank = _blank_descriptor(x.shape, x.stride(), x.dtype, tokens, channels)
    made = TensorDescriptor.__new__(TensorDescriptor)
    made.__dict__.update(blank.__dict__, base=x)
    return made


@lru_cache(maxsize=1024)
def _blank_descriptor(
    shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, tokens: int, channels: int
) -> TensorDescriptor:
    """Of an empty tensor: to make and to check one takes the host as long as to launch a kernel."""
    block = [*[1] * (len(shape) - 2), tokens, channels]
    # The stride of a dimension of 1 is never used, but TMA wants it at a multiple of 16 bytes too.
    outer = [stride if size > 1 else 64 for size, stride in zip(shape[:-1], strides[:-1], strict=True)]
    if dtype == torch.float32:  # in register order: what is neighbouring stays so
        layout: Any = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=len(shape))
    else:
        layout = gl.NVMMASharedLayout.get_default_for(block, _TYPES[dtype])
    return TensorDescriptor(torch.empty(0, dtype=dtype), list(shape), [*outer, 1], block, layout)


@lru_cache(maxsize=1024)
def _strides_fit(shape: torch.Size, strides: tuple[int, ...], element_size: int) -> bool:
    outer = zip(shape[:3], strides[:3], strict=True)
    aligned = all(size == 1 or (stride > 0 and stride * element_size % 16 == 0) for size, stride in outer)
    return aligned and (strides[3] == 1 or shape[3] == 1)
