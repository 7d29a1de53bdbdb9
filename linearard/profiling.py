"""A profile of one step: a Chrome trace, and the seconds of each part."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

PARTS = ("teacher", "student forward", "backward", "relation KL", "optimizer")
PREFIX = "linearard: "


def part(name: str) -> contextlib.AbstractContextManager[Any]:
    """Marks what belongs to a part of the step, one of `PARTS`; costs a microsecond where nothing is profiled."""
    assert name in PARTS, name
    return record_function(PREFIX + name)


@contextlib.contextmanager
def traced(folder: Path | None, device: torch.device) -> Iterator[None]:
    """Profiles what happens within, and writes trace.json (chrome://tracing, Perfetto) and summary.json.

    Args:
        folder: is made; None: nothing is profiled (ranks other than 0).
        device: whose work is finished before the profile starts and ends.
    """
    if folder is None:
        yield
        return
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    _finish(device)
    with profile(activities=activities) as profiler:
        yield
        _finish(device)
    folder.mkdir(parents=True, exist_ok=True)
    trace = folder / "trace.json"
    profiler.export_chrome_trace(str(trace))
    (folder / "summary.json").write_text(json.dumps(summarise(json.loads(trace.read_text())), indent=2))


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary that `traced` wrote."""
    return json.loads((folder / "summary.json").read_text())


def summarise(trace: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each part of a Chrome trace.

    Args:
        trace: as torch.profiler exports it.

    Returns:
        {"parts": {part: {"host": seconds between entering and leaving, "gpu": seconds in which a kernel launched there
        ran}}, "communication": {"gpu": seconds of NCCL kernels and of waiting for signals, "alone": those in which
        nothing else ran}, "gpu_busy", "step": seconds}. Relation KL is part of backward, and counted there, too. Where
        teacher and student go through the layers together, what is the teacher's is not the student's. Without a GPU
        the host's only.
    """
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X"]
    marks = [e for e in events if e["name"].startswith(PREFIX) and e.get("cat") == "user_annotation"]
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    launches = {
        e["args"]["correlation"]: e for e in events if e.get("cat") == "cuda_runtime" and "correlation" in e["args"]
    }
    launches |= {
        e["args"]["correlation"]: e for e in events if e.get("cat") == "cuda_driver" and "correlation" in e["args"]
    }
    intervals: dict[str, list[tuple[float, float]]] = {name: [] for name in PARTS}
    communication, computation = [], []
    for kernel in kernels:
        span = (kernel["ts"], kernel["ts"] + kernel["dur"])
        waits = any(name in kernel["name"].lower() for name in ("nccl", "symmetric_memory"))
        (communication if waits else computation).append(span)
        launch = launches.get(kernel["args"].get("correlation"))
        if launch is None:
            continue
        found = {m["name"].removeprefix(PREFIX) for m in marks if m["ts"] <= launch["ts"] <= m["ts"] + m["dur"]}
        for name in found - ({"student forward"} if "teacher" in found else set()):
            intervals[name].append(span)
    host = {name: [(m["ts"], m["ts"] + m["dur"]) for m in marks if m["name"] == PREFIX + name] for name in PARTS}
    seconds = {name: _covered(spans) for name, spans in host.items()}
    seconds["student forward"] = _covered(host["student forward"] + host["teacher"]) - seconds["teacher"]
    parts = {name: {"host": seconds[name] * 1e-6, "gpu": _covered(intervals[name]) * 1e-6} for name in PARTS}
    busy, computing = _covered([*communication, *computation]), _covered(computation)
    begin = min((e["ts"] for e in marks), default=0.0)
    end = max((e["ts"] + e["dur"] for e in [*marks, *kernels]), default=begin)
    return {
        "parts": parts,
        "communication": {"gpu": _covered(communication) * 1e-6, "alone": (busy - computing) * 1e-6},
        "gpu_busy": busy * 1e-6,
        "step": (end - begin) * 1e-6,
    }


def in_words(summary: dict[str, Any]) -> str:
    """The summary in one line for the log."""
    which = "gpu" if summary["gpu_busy"] else "host"
    parts = [f"{name} {values[which]:.3f}" for name, values in summary["parts"].items()]
    communication = summary["communication"]
    parts.append(f"communication {communication['gpu']:.3f}, {communication['alone']:.3f} of it alone")
    return f"{summary['step']:.3f} s, of them on the {which.replace('gpu', 'GPU')}: {', '.join(parts)}"


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
