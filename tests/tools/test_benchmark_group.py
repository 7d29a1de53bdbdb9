"""The kernel benchmark over two processes on a CPU: all modes, what they send, and a gate that fails."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from relation_kl import cost_model

ROOT = Path(__file__).parents[2]
TINY = ["--lengths", "64", "--heads", "4", "--head-dims", "8", "--dtype", "fp32", "--repeats", "2"]


def _launch(tmp_path: Path, *options: str, before: str = "") -> subprocess.CompletedProcess[str]:
    script = tmp_path / "benchmark.py"
    script.write_text(f"import sys\n{before}import benchmark_kernels\nsys.exit(benchmark_kernels.main())\n")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "tools"))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, str(script), *TINY, "--device", "cpu", "--backend", "torch", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_all_modes(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    done = _launch(tmp_path, "--csv", str(path), "--head-groups", "3,4", "--commit", "abc")
    assert done.returncode == 0, done.stderr
    with path.open(newline="") as file:
        rows = {row["mode"]: row for row in csv.DictReader(file)}
    both = ("sequence", "sequence at once")
    of_groups = [f"{mode}, {count} groups" for count in (3, 4) for mode in both]
    assert list(rows) == ["one", *both, "heads", "heads+exchange", *of_groups]
    one = float(rows["one"]["median_ms"])
    relation = cost_model.Relation(tokens=64, heads=4, key_heads=4, head_dim=8, element_size=4)
    for mode, row in rows.items():
        ranks = 1 if mode == "one" else 2
        assert (row["ranks"], row["samples"], row["commit"]) == (str(ranks), "2", "abc")
        assert float(row["efficiency"]) == pytest.approx(one / (ranks * float(row["median_ms"])))
        if mode.startswith("sequence"):
            sent = cost_model.sequence(relation, 2, cost_model.Machine(), apart="at once" not in mode).sent
            assert float(row["sent_mib"]) * 2**20 == pytest.approx(sent)
            assert float(row["transfers_ms"]) > 0 and float(row["computation_ms"]) > 0
        else:
            assert row["sent_mib"] == ""
    assert done.stdout.count("\n     64    8 ") == len(rows)
    assert "gate: one, each head, head_dim 8" in done.stderr


def test_nothing_is_timed_where_the_gate_fails(tmp_path: Path) -> None:
    broken = (
        "from relation_kl import torch_visit\ntorch_visit.finish = lambda grad, unit, out: out.copy_(grad * 1.01)\n"
    )
    done = _launch(tmp_path, before=broken)
    assert done.returncode != 0
    assert "the gate failed: nothing was timed" in done.stderr
    assert "forward+backward ms" not in done.stdout


def test_more_groups_than_heads_are_refused(tmp_path: Path) -> None:
    done = _launch(tmp_path, "--head-groups", "5")
    assert done.returncode != 0
    assert "error: --head-groups: 5 are more than --heads 4; name fewer" in done.stderr
