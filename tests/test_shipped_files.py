"""The recipes and DeepSpeed files that ship."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml
from changed_config import changed

from linearard import config as configuration
from linearard import ds_config
from linearard.config import from_dict, load_config
from linearard.models.student import load_model_config
from linearard.trainer import check_run

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = sorted((ROOT / "launch").glob("*.yaml"))
DS_CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))


def test_something_ships() -> None:
    assert {path.name for path in LAUNCH} >= {"demo.yaml", "llama2_7b.yaml"}
    names = {"cpu.json", "zero1.json", "zero2.json", "zero3.json", "zero3_offload.json"}
    assert {path.name for path in DS_CONFIGS} >= names


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.name)
def test_shipped_deepspeed_files_are_completed(path: Path, precision: str, raw: dict[str, Any]) -> None:
    changes = {
        "deepspeed": str(path),
        "model.precision": precision,
        "parallel.sequence_parallel_size": 2,
        "train.micro_batch_size": 3,
        "train.gradient_accumulation_steps": 4,
        "train.gradient_clipping": 0.25,
    }
    done = ds_config.complete(from_dict(changed(raw, changes)))
    assert '"auto"' not in json.dumps(done)
    assert done["bf16"]["enabled"] is (precision == "bf16")
    assert done["train_micro_batch_size_per_gpu"] == 3 and done["gradient_accumulation_steps"] == 4
    assert done["gradient_clipping"] == 0.25 and done["sequence_parallel_size"] == 2


@pytest.mark.parametrize("path", LAUNCH, ids=lambda path: path.name)
def test_shipped_launch_files_load(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(path)
    done = ds_config.complete(config)
    assert done["sequence_parallel_size"] == config.parallel.sequence_parallel_size
    assert from_dict(yaml.safe_load(configuration.dump(config))) == config


def test_the_demo_uses_only_what_is_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:

    monkeypatch.chdir(ROOT)
    config = load_config("launch/demo.yaml", [f"data.sources.0.path={sysconfig.get_paths()['stdlib']}"])
    assert Path(config.model.path).is_dir() and not Path(config.model.path).is_absolute()
    native = load_model_config(config.model)
    check_run(config, native)
    assert config.data.seq_len == config.model.rope_parameters["factor"] * native.max_position_embeddings
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (Path(config.model.path) / name).is_file(), name
    # The file itself is complete, too: it can be tried without tools/demo.py.
    check_run(load_config("launch/demo.yaml"), native)
