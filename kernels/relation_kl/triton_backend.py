"""Launches the Triton kernels: grids, tile sizes, statistics. Nothing here waits for the GPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from .segments import Segments, locate_segments, tile_bounds
from .tiles import Tile, Tiles, pad_head_dim, pick_tiles
from .torch_backend import Operands
from .triton_kernels import backward_kernel, forward_kernel

# TRITON_INTERPRET is read where a kernel is defined: for Triton's own functions, when triton is imported. Set in
# between, it would interpret our kernels and not those.
INTERPRETING = isinstance(forward_kernel, InterpretedFunction) and isinstance(tl.sum, InterpretedFunction)

_LOG2_E = 1.4426950408889634
_DOT = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def forward(operands: Operands, softmax_scale: float, segment_ids: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Rows [B, H, T], and what backward wants.

    That is the maximum of each row's logits, of student and of teacher, in units of log 2; 1 / sum of its
    exponentials, of both; all float32 [B, H, T]; then the segments' reach.
    """
    q, k = operands.student_q, operands.student_k
    batch, heads, seq_len, _ = q.shape
    tile = _tiles(q).forward
    segments = None if segment_ids is None else locate_segments(segment_ids)
    kl, max_s, max_t, inverse_s, inverse_t = (
        torch.empty(batch, heads, seq_len, dtype=torch.float32, device=q.device) for _ in range(5)
    )
    with _on(q):
        forward_kernel[(triton.cdiv(seq_len, tile.block_m) * batch * heads,)](
            q,
            k,
            operands.teacher_q,
            operands.teacher_k,
            q.stride(),
            k.stride(),
            operands.teacher_q.stride(),
            operands.teacher_k.stride(),
            *_segment_arguments(segments, tile, q),
            kl,
            max_s,
            max_t,
            inverse_s,
            inverse_t,
            heads,
            heads // k.shape[1],
            seq_len,
            softmax_scale * _LOG2_E,
            **_constants(q, segments, tile),
        )
    reach = () if segments is None else (segments.first, segments.last, segments.run_start, segments.run_end)
    return kl, (max_s, max_t, inverse_s, inverse_t, *reach)


def backward(
    operands: Operands,
    softmax_scale: float,
    segment_ids: Tensor | None,
    statistics: Sequence[Tensor],
    row_grad: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of student_q and student_k; for a self-relation their sum, and None."""
    max_s, max_t, inverse_s, inverse_t, *reach = statistics
    segments = Segments(*reach) if reach else None
    g = row_grad.float()
    if segments is not None:
        g = torch.where(segments.first[:, None] >= 0, g, 0.0)
    # A power of two at or above the largest |g|: with g / unit at most 1 the weights keep clear of fp16's
    # limits, and dividing by it rounds nothing. On device, so that nobody waits for it.
    exponent = torch.frexp(g.abs().amax()).exponent
    unit = torch.ldexp(torch.ones((), device=g.device), exponent.clamp(min=-100))
    g = (g / unit).contiguous()

    def launch(own: tuple[Tensor, Tensor], others: tuple[Tensor, Tensor], below: bool, above: bool) -> Tensor:
        x_s, x_t = own
        y_s, y_t = others
        batch, heads, seq_len, _ = x_s.shape
        # As queries, `heads // y heads` of ours share one head of theirs; as keys it is the other way round.
        group = heads // y_s.shape[1] if below else y_s.shape[1] // heads
        tile = _tiles(x_s).backward
        grad = torch.empty_like(x_s)
        # fp16 loses weights below 6e-8; they are 2 at most, and its largest number is 65504.
        boost = 2.0**14 if x_s.dtype == torch.float16 else 1.0
        with _on(x_s):
            backward_kernel[(triton.cdiv(seq_len, tile.block_m) * batch * heads,)](
                x_s,
                x_t,
                y_s,
                y_t,
                x_s.stride(),
                x_t.stride(),
                y_s.stride(),
                y_t.stride(),
                *_segment_arguments(segments, tile, x_s),
                max_s,
                max_t,
                inverse_s,
                inverse_t,
                g,
                unit,
                grad,
                grad.stride(),
                heads,
                group,
                seq_len,
                softmax_scale * _LOG2_E,
                softmax_scale,
                **{"BELOW": below, "ABOVE": above, "BOOST": boost},
                **_constants(x_s, segments, tile),
            )
        return grad

    q = operands.student_q, operands.teacher_q
    k = operands.student_k, operands.teacher_k
    if operands.self_relation:
        return launch(q, q, below=True, above=True), None
    return launch(q, k, below=True, above=False), launch(k, q, below=False, above=True)


def value_and_grad(
    operands: Operands, softmax_scale: float, segment_ids: Tensor | None, row_grad: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows and both gradients. A row's gradient needs its whole lse first, so these are the two passes."""
    rows, statistics = forward(operands, softmax_scale, segment_ids)
    grad_q, grad_k = backward(operands, softmax_scale, segment_ids, statistics, row_grad)
    return rows, grad_q, grad_k


def _tiles(x: Tensor) -> Tiles:
    return pick_tiles(_architecture(x.device), x.shape[3], x.element_size())


@lru_cache
def _architecture(device: torch.device) -> str:
    if INTERPRETING:
        return "interpreter"
    if torch.version.hip is not None:
        return "hip"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _on(x: Tensor) -> Any:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device_of(x)


def _segment_arguments(segments: Segments | None, tile: Tile, unused: Tensor) -> tuple[Tensor, Tensor]:
    """The segments' names [B, T] and the tiles' bounds [B, tiles, 4]; without segments neither is read."""
    if segments is None:
        return unused, unused
    return segments.first, tile_bounds(segments, tile.block_m, tile.block_n)


def _constants(x: Tensor, segments: Segments | None, tile: Tile) -> dict[str, Any]:
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
