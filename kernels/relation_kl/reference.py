"""The dense O(T^2) version, written from the definition and differentiated by autograd.

It shares no code with the fast backends on purpose: tests and benchmarks compare them with this. Everything
is computed in the inputs' own dtype, so pass float64 for a truth to compare with, and bfloat16 or float16 to
see what a plain low-precision implementation loses.
"""

from __future__ import annotations

import torch
from torch import Tensor


def relation_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    softmax_scale: float | None = None,
    segment_ids: Tensor | None = None,
) -> Tensor:
    """KL divergence of each row of the causal self-relation: `attention_kl` with its keys as queries.

    Args:
        student: [B, H, T, D], any float dtype.
        teacher: [B, H, T, D], same dtype; treated as a constant.
        softmax_scale: factor of the logits; D**-0.5 by default.
        segment_ids: integer [B, T], negative = padding; None = one segment.

    Returns:
        [B, H, T] in the inputs' dtype, nats.
    """
    return attention_kl(student, student, teacher, teacher, softmax_scale=softmax_scale, segment_ids=segment_ids)


def attention_kl(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    *,
    softmax_scale: float | None = None,
    segment_ids: Tensor | None = None,
) -> Tensor:
    """KL divergence of each row of the causal attention distribution.

        S_ij = softmax_scale * q_i . k_j,  j <= i, same segment;   P_i = softmax_j(S_ij)
        KL_i = sum_j Pt_ij * (log Pt_ij - log Ps_ij)

    Args:
        student_q: [B, H, T, D], any float dtype.
        student_k: [B, Hkv, T, D]; query head h uses key head h // (H / Hkv).
        teacher_q: as student_q; treated as a constant.
        teacher_k: as student_k; treated as a constant.
        softmax_scale: factor of the logits; D**-0.5 by default.
        segment_ids: integer [B, T]: a row sees keys with its own id, at or before it. Negative = padding.

    Returns:
        [B, H, T] in the inputs' dtype, nats; 0 for padding rows.
    """
    batch, heads, seq_len, head_dim = student_q.shape
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    device = student_q.device
    if segment_ids is None:
        segment_ids = torch.zeros(batch, seq_len, dtype=torch.long, device=device)

    valid = segment_ids >= 0
    causal = torch.ones(seq_len, seq_len, dtype=torch.bool, device=device).tril()
    visible = causal & (segment_ids[:, :, None] == segment_ids[:, None, :]) & valid[:, :, None]
    # A padding row sees only itself here, so that its softmax is defined; its result is dropped below.
    visible = visible | torch.eye(seq_len, dtype=torch.bool, device=device)
    visible = visible[:, None]
    keep = valid[:, None, :, None]

    def log_probabilities(q: Tensor, k: Tensor) -> Tensor:
        # Padding may hold anything, NaN included: it is replaced before any product.
        q = torch.where(keep, q, 0.0)
        k = torch.where(keep, k, 0.0).repeat_interleave(heads // k.shape[1], dim=1)
        logits = (q @ k.transpose(-1, -2)) * scale
        return torch.log_softmax(logits.masked_fill(~visible, float("-inf")), dim=-1)

    log_student = log_probabilities(student_q, student_k)
    log_teacher = log_probabilities(teacher_q.detach(), teacher_k.detach())
    # Outside the visible keys both logarithms are -inf; their difference must not become NaN.
    difference = log_teacher.masked_fill(~visible, 0.0) - log_student.masked_fill(~visible, 0.0)
    rows = (log_teacher.exp() * difference).sum(-1)
    return torch.where(valid[:, None, :], rows, 0.0)
