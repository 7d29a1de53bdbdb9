"""The benchmark of whole steps on a CPU: tiny model, real engines; what it reports, and that it gives memory back."""

from __future__ import annotations

import csv
import gc
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from distributed import run

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "--model",
    "tiny",
    "--lengths",
    "64",
    "--lora-rank",
    "4",
    "--precision",
    "fp32",
    "--steps",
    "1",
    "--warmup",
    "1",
]
TINY += ["--deepspeed", str(ROOT / "ds_configs" / "zero3.json"), "--commit", "abc"]


def _tool() -> ModuleType:
    return importlib.import_module("benchmark_training")


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _main(arguments: list[str], cases: str, out: str) -> None:
    """Worker: runs the tool; the case qk runs out of memory in the middle of a backward pass."""
    from linearard import losses

    tool: Any = _tool()
    written = tool._line
    alive: list[int] = []

    def full(*arguments: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def line(row: dict[str, Any]) -> str:
        gc.collect()
        alive.append(sum(t.numel() for t in gc.get_objects() if isinstance(t, torch.Tensor)))
        return written(row)

    tool._line = line
    setattr(losses, "attention_kl_value_and_grad", full)  # noqa: B010
    status = tool.main([*TINY, *arguments, "--cases", cases, "--csv", f"{out}.csv"])
    if torch.distributed.is_initialized():
        raise AssertionError("the process group is still there")
    Path(f"{out}.json").write_text(json.dumps({"status": status, "alive": alive}))


def test_one_process(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--profile", str(tmp_path / "profiles"), "--teacher-tensors", "keep"]
    run(1, _main, tmp_path / "run", arguments, "next,qk@16,qq+kk+vv@16,qq+next@full", str(out))
    report = json.loads(Path(f"{out}.json").read_text())
    assert report["status"] == 0
    assert max(report["alive"]) < 5000, "elements of tensors that are left: the model has 20,000"
    rows = _rows(Path(f"{out}.csv"))
    assert tuple(rows[0]) == _tool().COLUMNS
    assert [(row["case"], row["status"]) for row in rows] == [
        ("next", "ok"), ("qk@16", "out of memory"), ("qq+kk+vv@16", "ok"), ("qq+next@full", "ok"),
    ]  # fmt: skip
    first = float(rows[0]["seconds"])
    for row in rows:
        assert (row["world_size"], row["commit"], row["gpu"], row["lora_rank"]) == ("1", "abc", "no GPU", "4")
        assert float(row["planned_seconds"]) > 0 and float(row["planned_gib"]) > 0
        if row["status"] == "ok":
            assert float(row["over_next"]) == pytest.approx(float(row["seconds"]) / first)
            assert float(row["tokens_per_second_per_gpu"]) == pytest.approx(64 / float(row["seconds"]))
            assert float(row["fastest"]) <= float(row["seconds"]) <= float(row["slowest"])
            assert float(row["seconds_error"]) == pytest.approx(
                float(row["planned_seconds"]) / float(row["seconds"]) - 1
            )
    assert float(rows[0]["loss"]) > 1 and float(rows[2]["loss"]) > 0
    assert (rows[0]["teacher_tensors"], rows[2]["teacher_tensors"]) == ("", "keep")

    # The profile of each measured case: parts lie where they belong.
    folders = sorted(path.name for path in (tmp_path / "profiles").iterdir())
    assert folders == ["next-full-64x1", "qq_kk_vv-16-64x1", "qq_next-full-64x1"]
    summary = json.loads((tmp_path / "profiles" / folders[1] / "summary.json").read_text())
    host = {name: values["host"] for name, values in summary["parts"].items()}
    assert all(seconds > 0 for seconds in host.values()), host
    assert host["relation KL"] < host["backward"] < summary["step"]
    assert sum(host[name] for name in ("teacher", "student forward", "backward", "optimizer")) <= summary["step"]


def test_two_ranks(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--sequence-parallel-size", "2", "--warmup", "0"]
    run(2, _main, tmp_path / "run", arguments, "qk+next@16,qq+next@full", str(out))
    rows = _rows(Path(f"{out}.csv"))
    assert rows[1]["seconds"] == rows[1]["first_step_seconds"]
    assert [(row["status"], row["world_size"], row["sequence_parallel_size"]) for row in rows] == [
        ("out of memory", "2", "2"), ("ok", "2", "2"),
    ]  # fmt: skip
    assert float(rows[1]["tokens_per_second_per_gpu"]) == pytest.approx(32 / float(rows[1]["seconds"]))


def test_cases_and_presets() -> None:
    tool: Any = _tool()
    issue = tool.parse([]).list
    assert [case.name for case in issue] == ["next", "qq+kk+vv@4096", "qq+kk+vv@full", "qq+kk+vv+next@4096"]
    assert {(case.seq_len, case.micro_batch_size) for case in issue} == {(32768, 1)}
    stage1 = tool.parse(["--cases", "stage1"])
    assert stage1.sequence_parallel_size == 1
    assert [(case.name, case.micro_batch_size) for case in stage1.list] == [
        ("next", 4), ("qq+kk+vv@full", 4), ("next", 8), ("qq+kk+vv@full", 8),
    ]  # fmt: skip
    lengths = tool.parse(["--lengths", "4096,8192", "--cases", "vv@4096", "--micro-batch-sizes", "2"]).list
    assert [(case.name, case.seq_len) for case in lengths] == [("vv@full", 4096), ("vv@4096", 8192)]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--cases", "qx@16"], "--cases: 'qx@16' is not possible; choose issue, stage1, or terms such as"),
        (["--cases", "issue,next"], "--cases: issue stands alone"),
        (["--model", "llama9"], "--model: llama9 is neither a folder nor one of"),
        (["--csv", "/no/such/folder/x.csv"], "--csv: /no/such/folder/x.csv cannot be written"),
        (["--steps", "0"], "--steps: '0' is not possible"),
        (["--warmup", "0.5"], "--warmup: '0.5' is not possible; give a whole number from 0 on"),
    ],
)
def test_mistakes_give_one_line(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _tool().main(arguments) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith(f"error: {expected}")
