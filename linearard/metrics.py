"""What a step costs and where its figures go: metrics.jsonl, TensorBoard, floating-point operations, memory."""

from __future__ import annotations

import json
import math
import re
import resource
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from linearard.cluster import GIB, GPUS

# Dense bf16 peak of one GPU in TFLOP/s, from the vendors' data sheets; for MFU only.
PEAK_TFLOPS = {"H800": 989.0, "A800": 312.0, "L40S": 362.0, **{name: gpu.peak_tflops for name, gpu in GPUS.items()}}

QKV_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value")  # in parameters' names


class MetricsWriter:
    """Appends one JSON object a step to metrics.jsonl and the numbers in it to TensorBoard; rank 0 only."""

    def __init__(self, run_dir: Path, finished_steps: int, tensorboard: bool) -> None:
        """Steps after `finished_steps`, left behind by a run that was killed after its last checkpoint, are dropped.

        Records count steps from 1: the checkpoint of 50 finished steps belongs to the record of step 50.
        """
        run_dir.mkdir(parents=True, exist_ok=True)
        self._path = run_dir / "metrics.jsonl"
        if self._path.exists():
            lines = self._path.read_text().splitlines(keepends=True)
            self._path.write_text("".join(line for line in lines if _step_of(line) <= finished_steps))
        self._file = self._path.open("a", encoding="utf-8")
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=finished_steps + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Writes one step's record; it must have "step"."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in _flat(record):
                self._board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):  # the half line of a killed process
        return float("inf")


def _flat(record: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for key, value in record.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            found += _flat(value, f"{name}/")
        elif isinstance(value, int | float) and key != "step":
            found.append((name, float(value)))
    return found


class Pass(NamedTuple):
    """What one model needs for each token of a step.

    Attributes:
        weights: in matrix products.
        trained: those of them that get a gradient.
        attention_layers: layers whose attention is computed.
    """

    weights: int
    trained: int
    attention_layers: int


def needed_weights(sizes: dict[str, int], last_layer: int | None) -> dict[str, int]:
    """Those of a model's parameters (name -> size) that take part in matrix products of a pass.

    Args:
        sizes: of all parameters; a head tied to the embeddings under a name without "embed".
        last_layer: nothing behind this layer's q, k, v is needed; None: logits are.
    """

    def needed(name: str) -> bool:
        found = re.search(r"\blayers\.(\d+)\.", name)
        if found is None:
            return last_layer is None and "embed" not in name
        layer, last = int(found[1]), math.inf if last_layer is None else last_layer
        return layer < last or (layer == last and any(part in name for part in QKV_PROJECTIONS))

    return {name: size for name, size in sizes.items() if "norm" not in name and needed(name)}


def step_flops(
    *,
    tokens: int,
    seq_len: int,
    window: int,
    student: Pass,
    teacher: Pass | None,
    relation_layers: int,
    heads: dict[str, int],
    num_attention_heads: int,
    head_dim: int,
) -> float:
    """Floating-point operations that one step needs, over all ranks; nothing is counted for recomputation.

    Per token, with N weights in matrix products: teacher 2 N (without adapters); student forward 2 N, gradient of
    activations 2 N, gradient of weights 2 N_trained. Attention of H heads of dimension D over a causal context of n:
    forward 2 H D n (two half products of n x n), backward twice that; teacher with n = window. Where no term needs the
    logits, a pass ends with q, k, v of the last layer that is observed. A relation of H_r heads: 6 half products over
    the window, 6 H_r D window per token and layer.
    """
    attention = 2.0 * num_attention_heads * head_dim
    total = 4.0 * student.weights + 2.0 * student.trained + 3.0 * attention * student.attention_layers * seq_len
    if teacher is not None:
        total += 2.0 * teacher.weights + attention * teacher.attention_layers * window
    total += 6.0 * head_dim * window * relation_layers * sum(heads.values())
    return tokens * total


def peak_tflops(device: torch.device, configured: float | None) -> float | None:
    """The peak that MFU is measured against, or None where it is not known (no MFU is reported then)."""
    if configured is not None or device.type != "cuda":
        return configured
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_TFLOPS.items() if key in name), None)


def memory_gib(device: torch.device) -> dict[str, float]:
    """This rank's memory in GiB: allocated now and at its peak on a GPU, peak resident size on a CPU."""
    if device.type == "cuda":
        return {
            "allocated_gib": torch.cuda.memory_allocated(device) / GIB,
            "peak_allocated_gib": torch.cuda.max_memory_allocated(device) / GIB,
        }
    return {"peak_resident_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


class StepTimer:
    """Seconds between calls, with the device's work finished."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last = time.perf_counter()

    def lap(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        return elapsed
