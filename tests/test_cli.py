"""The command line: exit statuses, one line for each mistake, and a dry run that leaves nothing behind."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from distributed import raw_config, tiny_model
from tiny_text import write_texts, write_tokenizer

from linearard import config as configuration
from linearard import doctor, train

ROOT = Path(__file__).resolve().parent.parent
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_model("llama", tmp_path_factory.mktemp("cli") / "model")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("cli") / "texts", files=12)


@pytest.fixture
def config_file(tmp_path: Path, model: Path, texts: Path) -> Path:
    raw = raw_config(model, tmp_path / "ds")
    raw["run_dir"] = str(tmp_path / "run")
    raw["data"] |= {"sources": [{"path": str(texts)}], "cache_dir": str(tmp_path / "cache")}
    raw["train"]["max_steps"] = 1
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(raw))
    return file


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Calls linearard.train.main in this process; environment and logging are put back afterwards."""
    environment, logger = dict(os.environ), logging.getLogger("linearard")
    before = (logger.handlers[:], logger.level, logger.propagate)

    def call(*arguments: Any) -> tuple[int, str, str]:
        capfd.readouterr()
        status = train.main([str(argument) for argument in arguments])
        return status, *capfd.readouterr()

    yield call
    os.environ.clear()
    os.environ.update(environment)
    logger.handlers[:], logger.level, logger.propagate = before


def _the_error(status: int, out: str, err: str) -> str:
    """The one line that a mistake gives."""
    assert status == 2
    assert "Traceback" not in out + err
    lines = err.splitlines()  # a library's warnings and progress may come before
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], err
    return lines[-1]


def test_dry_run_prints_the_resolved_configuration_and_writes_nothing(config_file: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    command = [sys.executable, "-m", "linearard.train", "--config", str(config_file), "train.seed=5"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    result = subprocess.run(
        [*command, "--dry-run", "train.learning_rate=1e-5"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    printed = yaml.safe_load(result.stdout)
    config = configuration.load_config(config_file, ["train.seed=5", "train.learning_rate=1e-5"])
    assert printed == configuration.to_dict(config)
    assert (printed["train"]["seed"], printed["train"]["learning_rate"]) == (5, 1e-5)
    assert "Traceback" not in result.stderr and "error" not in result.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_dry_run_plans_and_refuses_what_cannot_fit(run: Run, config_file: Path) -> None:
    status, out, _ = run("--config", config_file, "--dry-run", "cluster.gpu=H100", "teacher.tensors=keep")
    assert status == 0 and yaml.safe_load(out)["cluster"]["gpu"] == "H100"
    plan = [line for line in out.splitlines() if line.startswith("#")]
    assert plan[0].startswith("# Plan for 1 x H100") and "scaled from the H200's" in plan[1]
    for part in ("weights of the base", "peak of the allocator", "teacher", "step", "longest data.seq_len that fits"):
        assert any(line.removeprefix("#").strip().startswith(part) for line in plan), part
    status, out, err = run("--config", config_file, "--dry-run", "cluster.memory_gib=2.5", "cluster.gpu=H200")
    assert "data.seq_len: 64 tokens on 1 H200 need" in _the_error(status, out, err)
    assert "# Plan for 1 x H200" in out  # to see why
    status, out, err = run("--config", config_file, "--dry-run", "cluster.gpu=Z80")
    assert "cluster.gpu: 'Z80'" in _the_error(status, out, err)


def test_a_profiled_step(run: Run, config_file: Path, tmp_path: Path) -> None:
    status, _, err = run("--config", config_file, "profile.step=1", "evaluation.enabled=false")
    assert status == 0, err
    assert "profile of step 1 in" in err and "relation KL" in err
    assert {path.name for path in (tmp_path / "run" / "profile" / "step-1").iterdir()} == {"trace.json", "summary.json"}


def test_mistakes_that_are_found_before_anything_starts(run: Run, config_file: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    garbage = tmp_path / "garbage"
    garbage.mkdir()
    (garbage / "config.json").write_text("{ this is not JSON")
    (tmp_path / "list.yaml").write_text("- 1\n")
    for arguments, expected in (
        (["--config", tmp_path / "none.yaml"], "none.yaml: no such file"),
        (["--config", tmp_path / "list.yaml"], "must hold a mapping"),
        (["--config", config_file, "train.max_steps"], "write key.subkey=value"),
        (["--config", config_file, "train.max_steps=soon"], "train.max_steps: expected int, got 'soon'"),
        (["--config", config_file, "train.maxsteps=3"], "train.maxsteps: unknown key"),
        (["--config", config_file, "deepspeed=nowhere.json"], "deepspeed: nowhere.json: no such file"),
        (["--config", config_file, f"model.path={tmp_path}/none"], "model.path: "),
        (["--config", config_file, f"model.path={empty}"], "model.path: "),
        (["--config", config_file, f"model.path={garbage}"], "not a valid JSON file"),
        (["--config", config_file, "data.sources.0.path=/no/texts"], "data.sources.0.path: /no/texts: no such"),
        (["--config", config_file, "parallel.sequence_parallel_size=8"], "does not divide the model's 4 attention"),
        (["--config", config_file, "model.rope_parameters.factor=1"], "model.rope_parameters.factor: 1.0"),
    ):
        for dry in ([], ["--dry-run"]):
            status, out, err = run(*arguments, *dry)
            assert expected in _the_error(status, out, err)
            assert out == ""
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def test_mistakes_that_are_found_when_the_run_starts(
    run: Run, config_file: Path, model: Path, texts: Path, tmp_path: Path
) -> None:
    def base(name: str, **files: bytes | None) -> str:
        """model.path= of a copy of the model with other contents in some files; None: the file is gone."""
        folder = tmp_path / name
        folder.mkdir()
        for file in model.iterdir():
            content = files.get(file.name.replace(".", "_"), file.read_bytes())
            if content is not None:
                (folder / file.name).write_bytes(content)
        return f"model.path={folder}"

    weights = (model / "model.safetensors").read_bytes()
    pickled = base("pickled", model_safetensors=None)
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"no weights")
    short = tmp_path / "short"
    short.mkdir()
    (short / "a.txt").write_text("w1 w2 w3 w4 w5")
    (tmp_path / "occupied").write_text("a file")
    no_tokenizer = {"tokenizer_json": None, "tokenizer_config_json": None}
    for arguments, expected in (
        ([base("truncated", model_safetensors=weights[: len(weights) // 2])], "model.path: "),
        ([base("scrambled", model_safetensors=b"not tensors at all")], "unreadable weights"),
        ([pickled], "model.path: "),
        ([base("gone", model_safetensors=None)], "model.path: "),
        ([base("wordless", **no_tokenizer)], "tokenizer "),
        ([f"data.sources.0.path={short}"], "tokens to train on"),
        (["data.seq_len=8192"], "one sequence needs data.seq_len 8,192; add text or shorten data.seq_len"),
        ([f"data.sources.0.path={texts}", 'data.sources.0.include=["*.rst"]'], "set include, exclude or format"),
        ([f"run_dir={tmp_path / 'occupied'}"], "occupied cannot be written"),
        (["parallel.sequence_parallel_size=2"], "2 does not divide the 1 started processes; start a multiple"),
        (["model.lora.target_modules=[q_proj, query]"], "model.lora.target_modules: the model has no module named qu"),
    ):
        status, out, err = run("--config", config_file, *arguments)
        assert expected in _the_error(status, out, err), arguments
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("order", [0, 1, 2])
def test_overrides_may_stand_anywhere(run: Run, config_file: Path, order: int) -> None:
    words = ["--config", config_file, "train.seed=3", "--dry-run", "train.max_steps=9", "--local_rank=0"]
    words = {0: words, 1: [*words[2:], *words[:2]], 2: [*words[3:], *words[:3]]}[order]
    status, out, _ = run(*words)
    printed = yaml.safe_load(out)
    assert status == 0 and (printed["train"]["seed"], printed["train"]["max_steps"]) == (3, 9)


def test_the_doctor_is_content_on_a_cpu(capsys: pytest.CaptureFixture[str], config_file: Path) -> None:
    assert doctor.main([]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == "all checks passed"
    assert not any(line.startswith("FAIL") for line in out)
    for subject in ("torch", "deepspeed", "relation_kl torch float32", "aliased q = k torch", "inv_freq"):
        assert any(line.split(maxsplit=1)[1].startswith(subject) for line in out[:-1]), subject
    assert doctor.main(["--config", str(config_file)]) == 0
    assert "differ by up to" in capsys.readouterr().out


def test_the_doctor_names_mistakes_and_failures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "kernel_parity", lambda device: iter(()))
    assert doctor.main(["--config", str(tmp_path / "none.yaml")]) == 2
    assert capsys.readouterr().err.startswith("error: --config ")
    wrong = doctor.Finding("FAIL", "relation_kl", "relative error 1")
    monkeypatch.setattr(doctor, "kernel_parity", lambda device: iter([wrong]))
    assert doctor.main([]) == 1
    assert "see FAIL above" in capsys.readouterr().out


def test_a_kernel_that_is_wrong_fails_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    right = doctor.relation_kl
    monkeypatch.setattr(doctor, "relation_kl", lambda *args, **kwargs: right(*args, **kwargs) * 1.001)
    findings = {f.subject: f.status for f in doctor.kernel_parity(torch.device("cpu"))}
    assert findings["relation_kl torch float32"] == "FAIL"
