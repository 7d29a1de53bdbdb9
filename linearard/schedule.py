"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math


def learning_rate(step: int, *, peak: float, warmup_steps: int, max_steps: int, min_lr_ratio: float) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up, then a cosine to min_lr_ratio * peak.

    The first step already has peak / warmup_steps (peak without warm-up); the last step, max_steps - 1,
    has exactly min_lr_ratio * peak.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    span = max(max_steps - 1 - warmup_steps, 1)
    progress = min((step - warmup_steps) / span, 1.0)
    return peak * (min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))
