"""Whole runs: killed and resumed, exported and reloaded, evaluated again by a slow loop.

The runs take minutes, so that all tests of them share one file: side by side, files are given to different processes.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import NATIVE
from whole_runs import HELD_OUT, PROBE, STEPS, Runs, config_of, make_runs, write_materials

TIMES = ("seconds", "tokens_per_second_per_gpu", "memory")  # what two equal runs need not share


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_materials(tmp_path_factory.mktemp("materials"))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, materials: tuple[Path, Path]) -> Runs:
    return make_runs(2, tmp_path_factory.mktemp("two"), materials, "")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, materials: tuple[Path, Path], two: Runs) -> Runs:
    return make_runs(1, tmp_path_factory.mktemp("one"), materials, str(two.folder))


@pytest.fixture(params=["two", "one"], ids=["two-ranks", "one-rank"])
def runs(request: pytest.FixtureRequest) -> Runs:
    return request.getfixturevalue(request.param)


def _export(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    from tools import export_hf

    monkeypatch.setattr(sys, "argv", ["export_hf.py", *(str(argument) for argument in arguments)])
    return export_hf.main()


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def _logits(model: Any, ids: torch.Tensor = PROBE) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def _trained(checkpoint: Path) -> dict[str, torch.Tensor]:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return get_fp32_state_dict_from_zero_checkpoint(
        str(checkpoint.parent), tag=checkpoint.name, exclude_frozen_parameters=True
    )


# ------------------------------------------------------------------------------------------------ resume


def test_a_killed_run_leaves_the_last_complete_checkpoint(runs: Runs) -> None:
    assert runs.after_kill["checkpoints"] == {"step-000002": True, "step-000004": False}
    assert runs.after_kill["latest"] == "step-000002"
    assert '"step": 4' in runs.after_kill["metrics"]  # steps that the resumed run has to do again


def test_killed_and_resumed_is_uninterrupted(runs: Runs) -> None:
    whole, killed = (
        [{key: value for key, value in record.items() if key not in TIMES} for record in runs.records(name)]
        for name in ("whole", "killed")
    )
    assert [record["step"] for record in whole] == [1, 2, 3, 4, 4]  # the last step is followed by an evaluation
    assert killed == whole  # losses, gradient norms, rates, tokens, evaluation: to the last bit
    assert len({record["loss"] for record in whole[:4]}) == 4
    last = f"checkpoints/step-{STEPS:06d}"
    first, second = (_trained(runs.folder / name / last) for name in ("whole", "killed"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert all(value.abs().max() > 0 for value in first.values())
    assert torch.equal(torch.load(runs.folder / "whole.pt"), torch.load(runs.folder / "killed.pt"))


def test_each_step_has_one_record_with_the_contract_s_fields(runs: Runs) -> None:
    for record in runs.records("killed")[:STEPS]:
        required = {"step", "loss", "relation_loss", "grad_norm", "lr", "tokens_seen", "tokens_per_second_per_gpu"}
        assert required | {"memory"} <= set(record)
        assert record["relation_loss"].keys() == {"qq", "kk", "vv", "qk"}
    seen = [record["tokens_seen"] for record in runs.records("killed")[:STEPS]]
    assert all(0 < b - a <= 64 for a, b in zip([0, *seen], seen, strict=False))


def test_a_finished_run_is_not_run_again(runs: Runs) -> None:
    """`again` and `moved` (equal weights in another folder) were allowed, and have added nothing."""
    assert runs.messages["again"] is None and runs.messages["moved"] is None
    assert len(runs.records("whole")) == STEPS + 1


def test_another_run_is_not_resumed(runs: Runs) -> None:
    messages = runs.messages
    assert all("\n" not in message for message in messages.values() if message)
    assert messages["rate"].startswith("train.learning_rate: 0.02 here, 0.01 in ")
    assert messages["afresh"].startswith("train.resume: false, but ") and "use another run_dir" in messages["afresh"]
    assert messages["base"].startswith("model.path: ") and "is not the model that" in messages["base"]
    assert messages["base"].endswith("restore it or use another run_dir")


def test_another_rope_or_number_of_processes_is_not_resumed(one: Runs) -> None:
    assert one.messages["rope"].startswith("model.rope_parameters.factor: 4.0 here, 8.0 in ")
    assert "saved by 2 processes, started with 1; start 2 processes" in one.messages["ranks"]
    assert "\n" not in one.messages["ranks"]


def test_latest_that_names_nothing_complete_is_refused(tmp_path: Path) -> None:
    from linearard import checkpoint
    from linearard.errors import UserError

    assert checkpoint.newest(tmp_path) is None
    (tmp_path / "checkpoints" / "step-000002").mkdir(parents=True)
    assert checkpoint.newest(tmp_path) is None
    (tmp_path / "checkpoints" / "latest").write_text("step-000002")
    with pytest.raises(UserError, match="names step-000002, which is not complete"):
        checkpoint.newest(tmp_path)
    with pytest.raises(UserError, match="not a complete checkpoint"):
        checkpoint.read_manifest(tmp_path / "checkpoints" / "step-000002")


def test_a_checkpoint_holds_what_is_trained_and_no_more(runs: Runs) -> None:
    folder = runs.folder / "whole" / "checkpoints" / f"step-{STEPS:06d}"
    names = set(_trained(folder))
    assert len(names) == 2 * 3 * 2 and all(".lora_" in name for name in names)
    weights = (runs.model / "model.safetensors").stat().st_size
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert weights > 1_500_000 and size < 300_000
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["step"] == STEPS and manifest["base"]["path"] == str(runs.model)


def test_old_checkpoints_are_removed(one: Runs) -> None:
    folder = one.folder / "qkv" / "checkpoints"
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-000003", "step-000004"]
    assert (folder / "latest").read_text() == "step-000004"


def test_tensorboard_and_the_resolved_configuration_are_written(one: Runs) -> None:
    from linearard.config import load_config

    assert list((one.folder / "hub" / "tensorboard").glob("events.*"))
    assert load_config(one.folder / "hub" / "config.yaml").model.revision == "v1"


def test_a_base_that_was_exchanged_is_noticed(materials: tuple[Path, Path], tmp_path: Path) -> None:
    """Also where the files that took its place are older than the run: `mv model old; mv other model`."""
    from linearard import checkpoint, trainer

    model, texts = materials
    place, run_dir = tmp_path / "place", tmp_path / "run"
    shutil.copytree(model, place)
    config = config_of(str(place), texts, run_dir)
    first = trainer._base_identity(config, run_dir, True)
    assert first == trainer._base_identity(config, run_dir, False) == checkpoint.base_identity(str(place))
    place.rename(tmp_path / "old")
    shutil.copytree(model.with_name("other"), place)
    for path in place.iterdir():
        os.utime(path, (1e9, 1e9))
    assert trainer._base_identity(config, run_dir, False)["sha256"] == checkpoint.base_identity(str(place))["sha256"]
    assert checkpoint.base_identity(str(place))["sha256"] != first["sha256"]


# ------------------------------------------------------------------------------------------------ export


@pytest.mark.parametrize("name", ["whole", "qkv", "full"])
def test_an_export_is_the_trained_student(
    name: str, one: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig, AutoTokenizer

    out = tmp_path / "out"
    assert _export(monkeypatch, one.folder / name, out) == 0
    config = AutoConfig.from_pretrained(out)
    assert config.rope_parameters == {"rope_type": "linear", "factor": 8.0, "rope_theta": 100.0}
    assert config.max_position_embeddings == 8 * NATIVE
    student = _load(out)
    assert student.dtype == torch.float32
    found, expected = _logits(student), torch.load(one.folder / f"{name}.pt")
    assert (found - expected).abs().max() <= 1e-5
    base = _load(one.model if name != "full" else one.model.with_name("tied"))
    assert (found - _logits(base)).abs().max() > 1e-2
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("w0 w79 nonsense", add_special_tokens=False)["input_ids"] == [4, 83, 3]
    assert tokenizer.bos_token_id == 1


def test_an_export_of_two_ranks_is_the_trained_student(
    two: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _export(monkeypatch, two.folder / "whole", tmp_path / "out") == 0
    assert (_logits(_load(tmp_path / "out")) - torch.load(two.folder / "whole.pt")).abs().max() <= 1e-5


def test_an_older_checkpoint_and_bf16(one: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest, older = tmp_path / "newest", tmp_path / "older"
    checkpoints = one.folder / "whole" / "checkpoints"
    assert _export(monkeypatch, checkpoints / "step-000004", newest) == 0
    assert _export(monkeypatch, checkpoints / "step-000002", older, "--dtype", "bf16") == 0
    newest_model, older_model = _load(newest), _load(older)
    assert older_model.dtype == torch.bfloat16
    base = dict(_load(one.model).named_parameters())
    for (name, new), old in zip(newest_model.named_parameters(), older_model.parameters(), strict=True):
        trained = any(part in name for part in ("q_proj", "k_proj", "v_proj"))
        assert torch.equal(new, base[name]) != trained  # the rest is the base's to the last bit
        moved, after = (old.float() - base[name]).norm(), (new - base[name]).norm()
        assert not trained or 0.1 < moved / after < 1.1  # half the steps, rounded to bf16
        assert trained or torch.equal(old, base[name].bfloat16())


def test_an_adapter_loads_with_peft(one: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    assert _export(monkeypatch, one.folder / "whole", out, "--adapter-only") == 0
    assert not (out / "model.safetensors").exists()
    assert (out / "adapter_model.safetensors").stat().st_size < 50_000
    config = AutoConfig.from_pretrained(out)
    assert config.max_position_embeddings == 8 * NATIVE
    base = AutoModelForCausalLM.from_pretrained(one.model, config=config)
    student = PeftModel.from_pretrained(base, str(out)).eval()
    assert (_logits(student) - torch.load(one.folder / "whole.pt")).abs().max() <= 1e-5
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 4
    assert AutoTokenizer.from_pretrained(out).bos_token_id == 1


def test_a_model_of_the_hub_at_a_revision(one: Runs) -> None:
    """Trained and exported from a name and a revision: main holds other weights."""
    found = _logits(_load(one.folder / "hub-export"))
    assert (found - torch.load(one.folder / "hub.pt")).abs().max() <= 1e-5
    qkv, hub = one.records("qkv")[0], one.records("hub")[0]
    assert hub["loss"] == qkv["loss"]  # the first step of the same training from a folder


def test_mistakes_of_an_export(
    one: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    used, empty, moved = tmp_path / "used", tmp_path / "empty", tmp_path / "moved"
    used.mkdir()
    (used / "notes.txt").write_text("mine")
    (empty / "checkpoints").mkdir(parents=True)
    shutil.copytree(one.folder / "whole", moved)
    manifest = moved / "checkpoints" / "step-000004" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(str(one.model), str(tmp_path / "gone")))
    whole, out = one.folder / "whole", tmp_path / "out"
    for arguments, expected in (
        ([whole, used], "used: is not an empty folder; name a new one"),
        ([whole, used / "notes.txt"], "notes.txt: is not an empty folder"),
        ([tmp_path / "nowhere", out], "nowhere: not a complete checkpoint"),
        ([empty, out], "empty: holds no checkpoint yet; train first"),
        ([one.folder / "qkv", out, "--adapter-only"], "trained qkv, there is no adapter"),
        ([whole, out, "--base", one.model.with_name("other")], "is not the base model that"),
        ([moved, out], "if the base model has moved, name its folder with --base"),
    ):
        capsys.readouterr()
        assert _export(monkeypatch, *arguments) == 2
        error = capsys.readouterr().err.splitlines()
        assert [line for line in error if line.startswith("error: ")] == error[-1:] and expected in error[-1]
        assert not out.exists()
    assert (used / "notes.txt").read_text() == "mine"
    assert _export(monkeypatch, moved, out, "--base", one.model.with_name("moved")) == 0


# -------------------------------------------------------------------------------------------- evaluation


def _slow_evaluation(model: Any, texts: Path, length: int, allow_short: bool) -> dict[str, Any]:
    """Loss, accuracy and loss by position of windows from the start of each held-out file, one token at a time."""
    from linearard.data import is_held_out

    words = {f"w{i}": i + 4 for i in range(80)}
    scored: list[tuple[int, float, bool]] = []  # (position, loss, right)
    files = [path for path in sorted(texts.iterdir()) if is_held_out(path.name, HELD_OUT)]
    assert 3 <= len(files) <= 20
    for path in files:
        tokens = [1, *(words[word] for word in path.read_text().split())]
        for start in range(0, len(tokens), length):
            window = tokens[start : start + length]
            if len(window) < 2 or (len(window) < length and not allow_short):
                continue
            logits = _logits(model, torch.tensor([window]))[0].double()
            for position, target in enumerate(window[1:]):
                row = logits[position]
                loss = float(torch.logsumexp(row, 0) - row[target])
                scored.append((position, loss, int(row.argmax()) == target))
    by_length, start, multiple = {}, 0, 1
    while start < length - 1:
        losses = [loss for position, loss, _ in scored if start <= position < multiple * NATIVE]
        by_length[f"{multiple}x"] = sum(losses) / len(losses)
        start, multiple = multiple * NATIVE, 2 * multiple
    mean = sum(loss for _, loss, _ in scored) / len(scored)
    return {
        "loss": mean,
        "perplexity": math.exp(mean),
        "accuracy": sum(right for _, _, right in scored) / len(scored),
        "tokens": len(scored),
        "loss_by_length": by_length,
    }


def test_the_evaluation_is_that_of_the_export(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _export(monkeypatch, runs.folder / "killed", tmp_path / "out") == 0
    student = _load(tmp_path / "out")
    scores = runs.records("killed")[-1]["evaluation"]
    assert scores.keys() == {"1x", "4x"}
    for name, length in (("1x", NATIVE), ("4x", 4 * NATIVE)):
        expected = _slow_evaluation(student, runs.texts, length, allow_short=name == "1x")
        by_length = expected.pop("loss_by_length")
        assert scores[name].pop("loss_by_length") == pytest.approx(by_length, rel=1e-5)
        assert scores[name] == pytest.approx(expected, rel=1e-5)
