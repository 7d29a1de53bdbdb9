"""Visits as kernels: what `torch_visit` describes, by the Hopper kernels or the general ones.

The kernels are those of whole sequences. They see the keys and, after them, the rows as one sequence, see
`triton_kernels`; between the two are so many tokens of padding that rows begin at a multiple of the tiles' sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import torch_visit
from .launch import launch
from .segment_kernels import starts_and_bounds, tile_bounds
from .tiles import HOPPER_BLOCK, HOPPER_ROWS, Pipeline
from .torch_backend import Operands
from .torch_visit import LARGE, State, Visit
from .triton_backend import (
    BOOST,
    LOG2_E,
    PROGRAMS_AGAIN,
    constants,
    on_device_of,
    pick,
    tensors_and_strides,
    tiles_of,
    unit_of,
)
from .triton_kernels import backward_kernel, forward_again_kernel, forward_kernel
from .visit_kernels import conclude_kernel, own_logits_kernel

_PIVOTS = 64  # tokens a program
_SUMS = 1024


@dataclass(frozen=True)
class Places:
    """Where keys and rows lie in their common sequence."""

    first_row: int  # 0: the keys are the rows' own
    keys_end: int
    seq_len: int
    names: Tensor | None  # ids [B, seq_len], contiguous

    def bounds(self, block_m: int, block_n: int) -> tuple[Tensor, Tensor] | None:
        """Ids, and `tile_bounds` of the common sequence."""
        return None if self.names is None else (self.names, tile_bounds(self.names, block_m, block_n))

    def starts_and_bounds(self, block_m: int, block_n: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """Ids, and `segment_kernels.starts_and_bounds` of the common sequence."""
        if self.names is None:
            return None
        return self.names, *starts_and_bounds(self.names, block_m, block_n, self.first_row, self.keys_end)


def places_of(visit: Visit) -> Places:
    rows, keys = visit.q_s.shape[2], visit.k_s.shape[2]
    if visit.diagonal:
        return Places(0, rows, rows, visit.row_ids)
    first_row = -(-keys // HOPPER_ROWS) * HOPPER_ROWS
    names = None
    if visit.row_ids is not None and visit.key_ids is not None:
        between = visit.row_ids.new_full((visit.row_ids.shape[0], first_row - keys), -1)
        names = torch.cat([visit.key_ids, between, visit.row_ids], 1)
    return Places(first_row, keys, first_row + rows, names)


def own_logits(q: Tensor, k: Tensor, scale: float, ids: Tensor | None) -> Tensor:
    """As `torch_visit.own_logits`."""
    batch, heads, seq_len, channels = q.shape
    out = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    names = q if ids is None else ids
    with on_device_of(q):
        launch(
            own_logits_kernel,
            -(-seq_len // _PIVOTS) * batch * heads,
            *(q, k, q.stride(), k.stride(), names, names.stride()),
            *(out, heads, heads // k.shape[1], seq_len, scale * LOG2_E),
            **{"channels": channels, "D": 1 << (channels - 1).bit_length(), "ROWS": _PIVOTS},
            **{"SEGMENTS": ids is not None, "num_warps": 4, "enable_fp_fusion": False},
        )
    return out


def conclude(state: State, ids: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """As `torch_visit.conclude`, in place."""
    m, total, a = state.m, state.total, state.a
    rows = a.shape[2]
    with on_device_of(a):
        launch(
            conclude_kernel,
            -(-a.numel() // _SUMS),
            *(m, total, a, a if ids is None else ids.contiguous(), a.numel(), a.shape[1] * rows, rows, LARGE),
            **{"SEGMENTS": ids is not None, "BLOCK": _SUMS, "num_warps": 4, "enable_fp_fusion": False},
        )
    return a, (m, total)


def forward(visit: Visit, scale: float, state: State) -> None:
    """Adds what the rows see of the keys to their state.

    Args:
        visit: tensors of the types that the Triton backend takes.
        scale: softmax_scale.
        state: of the rows, contiguous, with `own_logits` for pivots to begin with. What overflows relative to them is
            done again with a running maximum, which is the row's pivot then.
    """
    q, places = visit.q_s, places_of(visit)
    pipeline = _pipeline(visit.q_s)
    (m_s, m_t), (l_s, l_t), a = state.m, state.total, state.a
    if pipeline is None:
        tile = tiles_of(q).forward
        segments = places.bounds(tile.block_m, tile.block_n)
        programs = -(-q.shape[2] // tile.block_m) * q.shape[0] * q.shape[1]
        _launch(forward_kernel, programs, visit, places, scale, segments, tile, (a, m_s, m_t, l_s, l_t), ())
        return

    from . import hopper_backend

    segments = places.starts_and_bounds(HOPPER_BLOCK, HOPPER_BLOCK)
    rows = None if segments is None else segments[1:]
    with on_device_of(q):
        flags = hopper_backend.forward_visit(
            _fetchable(visit), places, scale, pipeline, rows, (m_s, m_t), (l_s, l_t, a)
        )
    segments = None if segments is None else (segments[0], segments[2])
    tile = replace(tiles_of(q).forward, block_m=HOPPER_BLOCK)
    count = flags.numel()
    outputs = flags, a, m_s, m_t, l_s, l_t
    _launch(forward_again_kernel, min(count, PROGRAMS_AGAIN), visit, places, scale, segments, tile, outputs, (count,))


def prepare(row_grad: Tensor, dtype: torch.dtype, scale: float, group: Any) -> tuple[Tensor, Tensor | None]:
    """As `torch_visit.prepare`; fp16 weights are kept clear of that type's limits, on all processes alike."""
    row_grad = (row_grad.float() * scale).contiguous()
    if dtype != torch.float16:
        return row_grad, None
    largest = row_grad.abs().amax()
    if group is not None:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    unit = unit_of(largest)
    return row_grad / unit * BOOST, unit / BOOST


def gradient_shape(x: Tensor) -> tuple[int, ...]:
    """As `torch_visit.gradient_shape`; the Hopper kernels' gradients are in the order of registers."""
    pipeline = _pipeline(x)
    if pipeline is None:
        return x.shape
    from . import hopper_backend

    return hopper_backend.gradient_shape(x, pipeline)


def finish(grad: Tensor, unit: Tensor | None, out: Tensor) -> None:
    """As `torch_visit.finish`."""
    pipeline = _pipeline(out)
    if pipeline is None:
        torch_visit.finish(grad, unit, out)
        return
    from . import hopper_backend

    with on_device_of(out):
        hopper_backend.finish(grad, 1.0, unit, pipeline, out)


def backward(
    visit: Visit, scale: float, statistics: Sequence[Tensor], row_grad: Tensor, q_grad: Tensor, k_grad: Tensor
) -> None:
    """Adds to the gradients of the rows and of the keys; see `torch_visit.backward`.

    The Hopper kernels add to them in no fixed order.
    """
    places = places_of(visit)
    m_s, m_t, l_s, l_t = (each for x in statistics for each in x.contiguous())
    pipeline = _pipeline(visit.q_s)
    if pipeline is not None:
        from . import hopper_backend

        segments = places.starts_and_bounds(HOPPER_BLOCK, HOPPER_BLOCK)
        with on_device_of(visit.q_s):
            hopper_backend.backward_visit(
                _fetchable(visit), places, scale, pipeline, segments, (m_s, m_t, l_s, l_t), row_grad, q_grad, k_grad
            )
        return
    q, k = visit.q_s, visit.k_s
    narrow = q.dtype == torch.float16
    if narrow:  # the general kernels multiply by it themselves
        row_grad = row_grad / BOOST
    tile = tiles_of(q).backward
    segments = places.bounds(tile.block_m, tile.block_n)
    of_rows = m_s, m_t, l_s.reciprocal(), l_t.reciprocal(), row_grad, row_grad
    for own, others, grad, below in (
        ((q, visit.q_t), (k, visit.k_t), q_grad, True),
        ((k, visit.k_t), (q, visit.q_t), k_grad, False),
    ):
        x, y = own[0], others[0]
        group = x.shape[1] // y.shape[1] if below else y.shape[1] // x.shape[1]
        with on_device_of(x):
            launch(
                backward_kernel,
                -(-x.shape[2] // tile.block_m) * x.shape[0] * x.shape[1],
                *own,
                *others,
                *(z.stride() for z in (*own, *others)),
                *(segments or (x, x)),
                *of_rows,
                grad,
                grad.stride(),
                x.shape[1],
                group,
                places.seq_len,
                places.first_row,
                places.keys_end,
                scale * LOG2_E,
                1.0,
                **{"BELOW": below, "ABOVE": not below, "NARROW": narrow, "VISIT": True},
                **constants(x, segments, tile),
            )


def _launch(
    kernel: Any,
    programs: int,
    visit: Visit,
    places: Places,
    scale: float,
    segments: tuple[Tensor, Tensor] | None,
    tile: Any,
    outputs: tuple[Tensor, ...],
    count: tuple[int, ...],
) -> None:
    """Of one of the two general forward kernels."""
    q = visit.q_s
    operands = Operands(q, visit.k_s, visit.q_t, visit.k_t, False)
    with on_device_of(q):
        launch(
            kernel,
            programs,
            *tensors_and_strides(operands),
            *(segments or (q, q)),
            *outputs,
            *count,
            q.shape[1],
            q.shape[1] // visit.k_s.shape[1],
            places.seq_len,
            places.first_row,
            places.keys_end,
            scale * LOG2_E,
            VISIT=True,
            **constants(q, segments, tile),
        )


def _pipeline(x: Tensor) -> Pipeline | None:
    """The Hopper kernels' shapes for chunks like x, whatever their lengths, or None.

    How x lies makes no difference: on other ranks it lies otherwise, and its gradient is to be in the same order there.
    The general kernels run where `torch.use_deterministic_algorithms(True)` asks for results that are equal bit for bit
    from run to run: they write each number once, while the Hopper ones add up a gradient in no fixed order.
    """
    if torch.are_deterministic_algorithms_enabled() or x.shape[3] * x.element_size() % 16 != 0:
        return None
    return pick(x)


def _fetchable(visit: Visit) -> Visit:
    """With copies of tensors that TMA cannot read where they lie."""
    from . import hopper_backend

    q_s, q_t, k_s, k_t = (
        x if hopper_backend.fetchable(x) else x.clone(memory_format=torch.contiguous_format) for x in visit[:4]
    )
    return visit._replace(q_s=q_s, q_t=q_t, k_s=k_s, k_t=k_t)
