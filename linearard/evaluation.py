"""Held-out evaluation: token-weighted loss, perplexity, top-1 accuracy, and loss by position."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

Forward = Callable[[torch.Tensor], torch.Tensor]  # input_ids [B, T] on the host -> logits [B, T, V]


@dataclass
class PositionSums:
    """Sums over scored tokens, by position: fp64 [T - 1]; position i predicts token i + 1."""

    loss: torch.Tensor
    correct: torch.Tensor
    count: torch.Tensor

    @classmethod
    def zeros(cls, length: int) -> PositionSums:
        return cls(*(torch.zeros(length - 1, dtype=torch.float64) for _ in range(3)))

    @property
    def mean_loss(self) -> float:
        """Nats per token, each token weighing the same."""
        return float(self.loss.sum() / self.count.sum().clamp_min(1))

    @property
    def accuracy(self) -> float:
        """Part of tokens whose most probable prediction was right."""
        return float(self.correct.sum() / self.count.sum().clamp_min(1))

    def loss_between(self, start: int, end: int) -> float:
        """Mean loss of the predictions made at positions start to end - 1; NaN if none was scored."""
        part = slice(start, end)
        count = self.count[part].sum()
        return float(self.loss[part].sum() / count) if count else math.nan

    def by_multiple(self, native: int) -> dict[str, float]:
        """Loss by position: {"1x": 0 to native - 1, "2x": native to 2 native - 1, "4x": to 4 native - 1, ...}."""
        buckets: dict[str, float] = {}
        start, multiple = 0, 1
        while start < len(self.count):
            buckets[f"{multiple}x"] = self.loss_between(start, native * multiple)
            start, multiple = native * multiple, multiple * 2
        return buckets


@torch.no_grad()
def score(
    forward: Forward,
    windows: Sequence[np.ndarray],
    length: int,
    *,
    batch_size: int = 1,
    report: Callable[[int], object] | None = None,
) -> PositionSums:
    """Scores every token but the first of each window, each window from its own start.

    Args:
        forward: the model; windows are padded at their end to `length`, causal attention does not see that.
        windows: token arrays of at most `length`.
        length: T of every forward pass.
        batch_size: B of every forward pass; the last batch is filled up with repeats that are not counted.
        report: called with the number of windows done.
    """
    sums = PositionSums.zeros(length)
    for first in range(0, len(windows), batch_size):
        part = windows[first : first + batch_size]
        ids = torch.zeros(batch_size, length, dtype=torch.int64)
        valid = torch.zeros(batch_size, length, dtype=torch.bool)
        for row in range(batch_size):
            window = part[row % len(part)]
            ids[row, : len(window)] = torch.from_numpy(np.asarray(window, dtype=np.int64))
            valid[row, : len(window)] = row < len(part)
        logits = forward(ids)
        for row in range(batch_size):
            _add(sums, logits[row, :-1], ids[row, 1:], valid[row, 1:])
        if report is not None:
            report(len(part))
    return sums


def _add(
    sums: PositionSums, logits: torch.Tensor, targets: torch.Tensor, valid: torch.Tensor, chunk: int = 4096
) -> None:
    targets = targets.to(logits.device)
    for start in range(0, len(targets), chunk):
        part = slice(start, start + chunk)
        scores = logits[part].float()
        loss = F.cross_entropy(scores, targets[part], reduction="none").double().cpu()
        correct = (scores.argmax(-1) == targets[part]).cpu()
        sums.loss[part] += torch.where(valid[part], loss, 0.0)
        sums.correct[part] += (correct & valid[part]).double()
        sums.count[part] += valid[part].double()


def summary(short: PositionSums, long: PositionSums | None, native: int) -> dict[str, object]:
    """short_loss, short_perplexity, short_accuracy at the native length and loss_by_length up to the longest."""
    return {
        "short_loss": short.mean_loss,
        "short_perplexity": math.exp(short.mean_loss),
        "short_accuracy": short.accuracy,
        "loss_by_length": (long or short).by_multiple(native),
    }
