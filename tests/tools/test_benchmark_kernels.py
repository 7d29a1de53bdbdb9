"""The kernel benchmark on a CPU: tiny shapes, the figures that can be checked without a GPU, users' mistakes."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import relation_kl as rk
import torch

TINY = ["--device", "cpu", "--backend", "torch", "--lengths", "48", "--head-dims", "16", "--heads", "4"]
TINY += ["--dtype", "fp32", "--repeats", "3", "--segments", "one"]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return importlib.import_module("benchmark_kernels")


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv_and_table(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    providers = ["relation_kl", "attention_kl", "torch_chunked", "dense", "sdpa"]
    path = tmp_path / "out.csv"
    options = ["--segments", "one,documents:3", "--providers", ",".join(providers), "--csv", str(path)]
    assert tool.main([*TINY, *options, "--commit", "abc"]) == 0

    rows = _rows(path)
    assert tuple(rows[0]) == tool.COLUMNS
    order = [(s, p, part) for s in ("one", "documents:3") for p in providers for part in tool.PARTS]
    assert [(row["segments"], row["provider"], row["part"]) for row in rows] == order
    for row in rows:
        figures = {key: float(row[key]) for key in ("p10_ms", "median_ms", "p90_ms", "tflops", "floor_tflops")}
        assert 0 < figures["p10_ms"] <= figures["median_ms"] <= figures["p90_ms"] < 10_000
        lengths = tool.Segments("documents", 3).lengths(48) if row["segments"] != "one" else [48]
        if row["provider"] == "sdpa":
            lengths = [max(lengths)]
            assert float(row["over_sdpa"]) == pytest.approx(1)
        count = 2 if row["part"] == "forward" else 7 if row["provider"] == "sdpa" else 6
        work = count * 4 * 16 * sum(n**2 for n in lengths)
        assert figures["tflops"] * 1e12 * figures["median_ms"] * 1e-3 == pytest.approx(work)
        assert float(row["floor_share"]) == pytest.approx(figures["tflops"] / figures["floor_tflops"])
        assert int(row["tokens_timed"]) == sum(lengths)
        assert row["kv_heads"] == ("1" if row["provider"] == "attention_kl" else "4")
        assert (row["status"], row["samples"], row["gate"], row["deterministic"]) == ("ok", "3", "passed", "False")
        assert (row["gpu"], row["torch"], row["commit"]) == ("no GPU", torch.__version__, "abc")
        assert row["peak_mib"] == row["fp32_per_row_head"] == ""
    by_key = {(row["segments"], row["provider"]): row for row in rows if row["part"] == "forward"}
    one, sdpa = by_key["one", "dense"], by_key["one", "sdpa"]
    assert float(one["over_sdpa"]) == pytest.approx(float(one["median_ms"]) / float(sdpa["median_ms"]))

    out, err = capsys.readouterr()
    heading, table = out.split("\n\n")
    assert torch.__version__ in heading and "commit abc" in heading and "correctness gate passed" in heading
    lines = table.splitlines()
    assert len(lines) == 1 + len(rows) // 2
    assert len({len(line) for line in lines}) == 1
    assert [line for line in err.splitlines() if not line.startswith("gate:")] == [
        "1/2: 48 tokens, head_dim 16, one",
        "2/2: 48 tokens, head_dim 16, documents:3",
    ]


@pytest.mark.parametrize(("kind", "number"), [("one", 0), ("windows", 32), ("documents", 1), ("documents", 7)])
def test_half_product_counts_the_pairs_within_segments(tool: ModuleType, kind: str, number: int) -> None:
    segments = tool.Segments(kind, number)
    lengths = segments.lengths(100)
    assert sum(lengths) == 100 and min(lengths) > 0 and lengths == segments.lengths(100)
    assert len(lengths) == {"one": 1, "windows": 4, "documents": number}[kind]
    ids = segments.ids(3, 100, torch.device("cpu"))
    assert (ids is None) == (kind == "one")
    ids = torch.zeros(3, 100, dtype=torch.int32) if ids is None else ids
    pairs = int((ids[:, :, None] == ids[:, None, :]).sum())
    shape = tool.Shape(3, 4, 2, 100, 8, "fp32", segments)
    # Half of the pairs, two operations (multiply and add) each.
    assert shape.half_product(lengths) == pairs * 4 * 8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--providers", "dense,fast"], ["--providers", "'fast'", "dense_compiled"]),
        (["--head-dims", "64,12"], ["--head-dims", "'12'", "multiple of 8"]),
        (["--head-dims", "264"], ["--head-dims", "up to 256"]),
        (["--lengths", "4k"], ["--lengths", "'4k'", "whole number"]),
        (["--repeats", "0"], ["--repeats", "from 1 on"]),
        (["--segments", "pages:3"], ["--segments", "'pages:3'", "windows:LENGTH"]),
        (["--segments", "documents:49"], ["--segments", "documents:49", "48 tokens", "fewer"]),
        (["--kv-heads", "3"], ["--kv-heads", "--heads 4", "divisor"]),
        (["--dtype", "fp8"], ["--dtype", "fp8", "bf16"]),
        (["--csv", "/nowhere/out.csv"], ["--csv", "/nowhere/out.csv", "existing folder"]),
        (["--length", "48"], ["--length", "--help"]),
    ],
    ids=str,
)
def test_mistakes_take_one_line(
    tool: ModuleType, arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main([*TINY, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert [word for word in words if word not in err] == []


def test_triton_without_a_gpu_is_a_mistake(
    tool: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert tool.main([*TINY, "--backend", "triton"]) == 2
    assert "--backend" in (err := capsys.readouterr().err) and "--backend torch" in err


@pytest.mark.parametrize(
    ("name", "wrong", "words"),
    [
        ("relation_kl", lambda rows: rows * 1.01, "relative error 1.00e-02"),
        ("attention_kl", lambda rows: rows * 1.01, "relative error 1.00e-02"),
        ("relation_kl", lambda rows: rows + 1e-9, "instead of exactly 0"),
        ("relation_kl", lambda rows: rows * float("nan"), "relative error nan"),
    ],
    ids=["1 %", "attention 1 %", "not 0", "NaN"],
)
def test_a_wrong_kernel_fails_the_gate(
    tool: ModuleType,
    name: str,
    wrong: Any,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = getattr(rk, name)
    monkeypatch.setattr(rk, name, lambda *args, **kwargs: wrong(right(*args, **kwargs)))
    path = tmp_path / "out.csv"
    providers = ["--providers", f"{name},dense", "--segments", "windows:4096"]
    assert tool.main([*TINY, *providers, "--csv", str(path)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and not path.exists()
    assert words in err and name in err and err.endswith("nothing was timed\n")


def test_what_does_not_fit_is_said(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the estimate (dense) and by running out of memory (relation_kl); the others are measured all the same."""
    build, switched = tool.build, []

    def small(name: str, *args: Any) -> Any:
        if name == "relation_kl":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return build(name, *args)

    monkeypatch.setattr(tool, "build", small)
    monkeypatch.setattr(tool, "DENSE_MATRICES", 1e12)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", switched.append)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    path = tmp_path / "out.csv"
    options = ["--providers", "relation_kl,dense,torch_chunked", "--csv", str(path)]
    assert tool.main([*TINY, *options, "--skip-gate", "--deterministic"]) == 0
    rows = _rows(path)
    assert [row["status"] for row in rows] == ["does not fit"] * 4 + ["ok"] * 2
    assert rows[0]["median_ms"] == "" and float(rows[4]["median_ms"]) > 0
    assert {(row["gate"], row["deterministic"], row["over_sdpa"]) for row in rows} == {("skipped", "True", "")}
    assert switched == [True]
    out = capsys.readouterr().out
    assert out.count("does not fit") == 2 and "gate skipped" in out


def test_samples_take_turns(tool: ModuleType) -> None:
    calls: list[str] = []
    tasks = [(lambda: calls.append("a"), 6), (lambda: calls.append("b"), 2)]
    times = tool.sample_in_turns(tasks, torch.device("cpu"))
    assert [len(each) for each in times] == [6, 2]
    assert "".join(calls) == "aaabaaab"


def test_defaults_are_the_table_of_the_documentation(tool: ModuleType) -> None:
    options = tool.parse(["--backend", "torch"])
    assert (options.lengths, options.head_dims, options.batch, options.heads) == ([4096, 16384, 32768], [128], 1, 32)
    assert (options.kv_heads, options.dtype, options.providers) == (8, "bf16", list(tool.PROVIDERS))
    assert [str(each) for each in options.segments] == ["one", "windows:4096", "documents:64"]
