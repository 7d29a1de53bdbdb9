"""The summary of a profile, from traces made by hand; the training loop's own is tested with the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from linearard import profiling


def _mark(part: str, start: float, length: float) -> dict[str, Any]:
    return {"ph": "X", "cat": "user_annotation", "name": profiling.PREFIX + part, "ts": start, "dur": length}


def _kernel(name: str, launched: float, start: float, length: float, number: int) -> list[dict[str, Any]]:
    arguments = {"correlation": number}
    return [
        {"ph": "X", "cat": "cuda_runtime", "name": "launch", "ts": launched, "dur": 1, "args": arguments},
        {"ph": "X", "cat": "kernel", "name": name, "ts": start, "dur": length, "args": arguments},
    ]


def test_kernels_belong_to_the_part_that_launched_them() -> None:
    second = 1e6
    events = [
        _mark("teacher", 0, 1 * second),
        _mark("backward", 1 * second, 2 * second),
        _mark("relation KL", 2 * second, 0.5 * second),
        *_kernel("gemm", 0.5 * second, 1 * second, 1 * second, 1),  # the teacher's, though it runs later
        *_kernel("kl", 2.1 * second, 3 * second, 1 * second, 2),
        *_kernel("ncclDevKernel_AllGather", 2.2 * second, 3.5 * second, 1 * second, 3),
        {"ph": "M", "name": "process_name"},
    ]
    summary = profiling.summarise({"traceEvents": events})
    assert summary["parts"]["teacher"] == {"host": pytest.approx(1), "gpu": pytest.approx(1)}
    assert summary["parts"]["relation KL"] == {"host": pytest.approx(0.5), "gpu": pytest.approx(1.5)}
    assert summary["parts"]["backward"]["gpu"] == pytest.approx(1.5)
    assert summary["parts"]["optimizer"] == {"host": 0, "gpu": 0}
    assert summary["communication"] == {"gpu": pytest.approx(1), "alone": pytest.approx(0.5)}
    assert (summary["gpu_busy"], summary["step"]) == (pytest.approx(2.5), pytest.approx(4.5))
    assert "relation KL 1.500" in profiling.in_words(summary) and "on the GPU" in profiling.in_words(summary)


def test_the_teacher_inside_the_students_forward_is_the_teachers() -> None:
    second = 1e6
    events = [
        _mark("student forward", 0, 4 * second),
        _mark("teacher", 1 * second, 1 * second),
        _mark("teacher", 3 * second, 0.5 * second),
        *_kernel("theirs", 1.5 * second, 2 * second, 1 * second, 1),
        *_kernel("mine", 2.5 * second, 3 * second, 0.5 * second, 2),
    ]
    parts = profiling.summarise({"traceEvents": events})["parts"]
    assert parts["teacher"] == {"host": pytest.approx(1.5), "gpu": pytest.approx(1)}
    assert parts["student forward"] == {"host": pytest.approx(2.5), "gpu": pytest.approx(0.5)}


def test_a_trace_is_written_only_where_asked(tmp_path: Path) -> None:
    device = torch.device("cpu")
    with profiling.traced(None, device), profiling.part("teacher"):
        pass
    assert list(tmp_path.iterdir()) == []
    with profiling.traced(tmp_path / "profile", device), profiling.part("student forward"):
        torch.randn(100, 100) @ torch.randn(100, 100)
    summary = profiling.read_summary(tmp_path / "profile")
    assert summary["parts"]["student forward"]["host"] > 0 and summary["parts"]["teacher"]["host"] == 0
    assert (tmp_path / "profile" / "trace.json").stat().st_size > 0
