"""Next-token loss and logits KL from the last hidden states: the logits of all tokens never exist at once.

The head is applied to a few tokens at a time. Value and gradient of these are computed together, so nothing of the
logits is kept for the backward pass and no product is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

Logits = Callable[[torch.Tensor], torch.Tensor]  # hidden states [n, E] -> logits [n, V]
CHUNK_LOGITS = 2**25  # logits of one chunk: 128 MiB in fp32


@dataclass(frozen=True)
class TokenTerms:
    """What is computed from the last hidden states of one micro-batch.

    Attributes:
        labels: next token of each position, int64 [B, N], -100 where there is none.
        next_token: factor of the sum of next-token cross-entropies.
        logits_kl: factor of the sum of KL(teacher || student) of the next-token distributions, where labels are >= 0.
        teacher_hidden: the teacher's last hidden states [B, N, E]; None where logits_kl is 0.
        chunk: tokens whose logits exist at a time.
    """

    labels: torch.Tensor
    next_token: float
    logits_kl: float
    teacher_hidden: torch.Tensor | None
    chunk: int


def chunk_tokens(vocabulary: int) -> int:
    """Tokens of one chunk: as many as keep it within `CHUNK_LOGITS` logits, a multiple of 64 where that is possible."""
    tokens = max(CHUNK_LOGITS // vocabulary, 1)
    return tokens - tokens % 64 if tokens > 64 else tokens


def token_loss(
    hidden: torch.Tensor, logits: Logits, trained: list[nn.Parameter], terms: TokenTerms, teacher_logits: Logits | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of the terms, differentiable in `hidden` and `trained`.

    Args:
        hidden: the student's last hidden states [B, N, E].
        logits: the student's head.
        trained: the head's own parameters that need a gradient (for those of modules inside it:
            `token_loss_of_adapted_head`).
        terms: what to compute.
        teacher_logits: the teacher's head; None where terms.logits_kl is 0.

    Returns:
        (terms.next_token * sum + terms.logits_kl * sum, fp32 []; the two sums without factors in nats, fp64 [2]).
    """
    return _TokenLoss.apply(hidden, logits, terms, teacher_logits, *trained)  # type: ignore[return-value]


def token_loss_of_adapted_head(
    hidden: torch.Tensor, logits: Logits, terms: TokenTerms, teacher_logits: Logits | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_loss` where modules inside the head are trained (adapters): each chunk is computed again in backward.

    ZeRO-3 gathers such modules' weights for each of their calls, so their gradient cannot be taken before backward.
    """
    theirs = None if terms.teacher_hidden is None else terms.teacher_hidden.flatten(0, 1)

    def chunk(x: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        reference = None
        if theirs is not None and teacher_logits is not None:
            with torch.no_grad():
                reference = teacher_logits(theirs[part])
        return _of_chunk(logits(x), reference, terms.labels.flatten()[part], terms)

    value = torch.zeros((), dtype=torch.float32, device=hidden.device)
    sums = torch.zeros(2, dtype=torch.float64, device=hidden.device)
    rows = hidden.flatten(0, 1)
    for start in range(0, len(rows), terms.chunk):
        part = slice(start, start + terms.chunk)
        result: Any = checkpoint(chunk, rows[part], part, use_reentrant=False)
        value, sums = value + result[0], sums + result[1]
    return value, sums


def _of_chunk(
    student: torch.Tensor, teacher: torch.Tensor | None, labels: torch.Tensor, terms: TokenTerms
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss fp32 [], sums fp64 [2]) of logits [n, V] and labels [n]; a term of factor 0 is not computed."""
    log_s = F.log_softmax(student.float(), -1)
    value, sums = log_s.new_zeros(()), log_s.new_zeros(2, dtype=torch.float64)
    if terms.next_token:
        total = F.nll_loss(log_s, labels, ignore_index=-100, reduction="sum")
        value, sums[0] = value + terms.next_token * total, total.detach()
    if teacher is not None:
        log_t = F.log_softmax(teacher.float(), -1)
        total = ((log_t.exp() * (log_t - log_s)).sum(-1) * (labels >= 0)).sum()
        value, sums[1] = value + terms.logits_kl * total, total.detach()
    return value, sums


class _TokenLoss(torch.autograd.Function):
    """Computes the gradient beside the value, chunk by chunk; backward only scales it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        logits: Logits,
        terms: TokenTerms,
        teacher_logits: Logits | None,
        *trained: nn.Parameter,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = hidden.detach().flatten(0, 1)
        of_hidden = torch.empty_like(rows)
        # fp32: the sum over chunks of a low-precision gradient would lose what one product over all tokens keeps.
        of_trained = [torch.zeros_like(p, dtype=torch.float32) for p in trained]
        value = torch.zeros((), dtype=torch.float32, device=rows.device)
        sums = torch.zeros(2, dtype=torch.float64, device=rows.device)
        labels = terms.labels.flatten()
        theirs = None if terms.teacher_hidden is None else terms.teacher_hidden.flatten(0, 1)
        for start in range(0, len(rows), terms.chunk):
            part = slice(start, start + terms.chunk)
            reference = None
            if theirs is not None and teacher_logits is not None:
                reference = teacher_logits(theirs[part])
            x = rows[part].requires_grad_()
            with torch.enable_grad():
                loss, sum_of_terms = _of_chunk(logits(x), reference, labels[part], terms)
            gradient, *rest = torch.autograd.grad(loss, (x, *trained))
            of_hidden[part] = gradient
            for total, part_of_it in zip(of_trained, rest, strict=True):
                total += part_of_it
            value += loss.detach()
            sums += sum_of_terms
        ctx.gradients = [of_hidden.view_as(hidden), *(g.to(p.dtype) for g, p in zip(of_trained, trained, strict=True))]
        ctx.mark_non_differentiable(sums)
        return value, sums

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor, _: Any) -> Any:
        gradients, ctx.gradients = ctx.gradients, None
        of_hidden, *of_trained = (gradient.mul_(upstream.to(gradient.dtype)) for gradient in gradients)
        return of_hidden, None, None, None, *of_trained
