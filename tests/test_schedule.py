"""The learning rate: its corners, its shape, and steps beyond the end."""

from __future__ import annotations

import itertools
import math

import pytest

from linearard.schedule import learning_rate


def _rates(warmup: int, steps: int, ratio: float = 0.1, peak: float = 2e-5) -> list[float]:
    return [
        learning_rate(step, peak=peak, warmup_steps=warmup, max_steps=steps, min_lr_ratio=ratio)
        for step in range(steps)
    ]


def test_corners_of_the_paper_s_schedule() -> None:
    rates = _rates(warmup=4, steps=144, ratio=0.9)
    assert rates[:4] == pytest.approx([0.5e-5, 1e-5, 1.5e-5, 2e-5])
    assert rates[4] == pytest.approx(2e-5)  # the cosine starts at the peak
    assert rates[-1] == pytest.approx(1.8e-5)
    assert min(rates[4:]) == rates[-1]


def test_warm_up_rises_and_the_cosine_falls() -> None:
    rates = _rates(warmup=10, steps=100)
    assert all(a < b for a, b in itertools.pairwise(rates[:10]))
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    # Half way between the first step of the cosine (10) and its last (99) it is the mean of both ends.
    middle = [learning_rate(s, peak=1.0, warmup_steps=10, max_steps=100, min_lr_ratio=0.2) for s in (54, 55)]
    assert sum(middle) / 2 == pytest.approx(0.6)
    quarter = learning_rate(30, peak=1.0, warmup_steps=0, max_steps=121, min_lr_ratio=0.0)
    assert quarter == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_short_runs_have_finite_positive_rates() -> None:
    assert _rates(warmup=0, steps=1) == [2e-5]
    assert _rates(warmup=0, steps=2) == pytest.approx([2e-5, 2e-6])
    assert _rates(warmup=4, steps=2) == pytest.approx([0.5e-5, 1e-5])  # shorter than its warm-up: no peak
    assert _rates(warmup=3, steps=4) == pytest.approx([2e-5 / 3, 4e-5 / 3, 2e-5, 2e-5])


def test_the_rate_stays_at_its_floor_after_the_end() -> None:
    late = learning_rate(500, peak=1.0, warmup_steps=4, max_steps=20, min_lr_ratio=0.25)
    assert late == pytest.approx(0.25)
    assert _rates(warmup=2, steps=9, ratio=1.0)[2:] == pytest.approx([2e-5] * 7)
