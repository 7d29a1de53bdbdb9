"""Reading a configuration: overrides, types, and what comes back from a dump."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from changed_config import changed, refusal

from linearard import config as configuration
from linearard.config import Config, from_dict, load_config
from linearard.errors import UserError


def _write(tmp_path: Path, raw: dict[str, Any]) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_overrides_reach_leaves_lists_and_absent_sections(tmp_path: Path, raw: dict[str, Any]) -> None:
    del raw["objective"]
    config = load_config(
        _write(tmp_path, raw),
        [
            "train.learning_rate=1e-5",
            "train.max_steps=7",
            "data.sources.0.path=/some/where",
            "data.sources.0.exclude=[a/*, b]",
            "objective.relations={qk: 1, vv: 0.5}",
            "objective.layers=[0, 1]",
            "teacher.window=12",
            "model.rope_parameters.factor=4",
            "model.tokenizer=",
            "metrics.tensorboard=no",
        ],
    )
    assert config.train.learning_rate == 1e-5 and isinstance(config.train.learning_rate, float)
    assert config.train.max_steps == 7
    assert config.data.sources[0].path == "/some/where" and config.data.sources[0].exclude == ("a/*", "b")
    assert config.objective.relations == {"qk": 1.0, "vv": 0.5}
    assert isinstance(config.objective.relations["qk"], float)
    assert config.objective.layers == (0, 1)
    assert config.teacher.window == 12
    assert config.model.rope_parameters == {"rope_type": "linear", "factor": 4}
    assert config.model.tokenizer is None and config.metrics.tensorboard is False


def test_numbers_that_yaml_reads_as_text(tmp_path: Path, raw: dict[str, Any]) -> None:
    path = tmp_path / "config.yaml"
    raw["train"].pop("learning_rate")
    path.write_text(yaml.safe_dump(raw) + "\n")
    text = path.read_text().replace("train:\n", "train:\n  learning_rate: 1e-5\n  adam_eps: 1E-7\n")
    assert yaml.safe_load(text)["train"]["learning_rate"] == "1e-5"  # YAML 1.1 wants 1.0e-5
    path.write_text(text)
    config = load_config(path)
    assert (config.train.learning_rate, config.train.adam_eps) == (1e-5, 1e-7)


def test_dump_round_trip(tmp_path: Path, raw: dict[str, Any]) -> None:
    raw["model"]["rope_parameters"] = {"rope_type": "longrope", "factor": 8.0, "short_factor": [1, 1.5, 2, 2.5]}
    raw["objective"]["layers"] = [1, 0]
    raw["data"]["sources"].append({"name": "some/set", "subset": "en", "include": ["*.md"], "max_documents": 3})
    raw["train"] |= {"learning_rate": 1e-5, "adam_eps": 1e-8}
    config = load_config(_write(tmp_path, raw))
    text = configuration.dump(config)
    assert from_dict(yaml.safe_load(text)) == config
    assert from_dict(json.loads(json.dumps(configuration.to_dict(config)))) == config  # manifest.json
    assert list(yaml.safe_load(text)) == [f.name for f in dataclasses.fields(Config)]


def test_the_tree_is_frozen() -> None:
    config = from_dict({})
    for node, name in ((config, "run_dir"), (config.train, "seed"), (config.model.lora, "r")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(node, name, 1)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, r"^--config .*config\.yaml: no such file; .*launch/"),
        (b"- a\n- b\n", r"must hold a mapping of keys, found list"),
        (b"", r"must hold a mapping of keys, found NoneType"),
        (b"a: [1, 2\nb: 3\n", r"cannot be read as YAML: .*line 2"),
        (b"\xff\xfe\xfa", r"cannot be read as YAML"),
    ],
)
def test_unreadable_files(tmp_path: Path, content: bytes | None, expected: str) -> None:
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=expected) as refused:
        load_config(path)
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="cannot be read as YAML"):
        load_config(tmp_path)  # a folder


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.learning_rate", r"write key\.subkey=value"),
        ("=3", r"write key\.subkey=value"),
        ("train.max_steps=[1", r"train\.max_steps=\[1.*not valid YAML; quote it"),
        ("train.max_steps=many", r"train\.max_steps: expected int, got 'many'"),
        ("train.max_step=3", r"train\.max_step: unknown key; known here: max_steps, "),
        ("trian.max_steps=3", r"^trian: unknown key; known here: run_dir, "),
        ("data.sources.3.path=x", r"data\.sources is a list of 1; use a number below it"),
        ("data.sources.first.path=x", r"data\.sources is a list of 1"),
        ("data.sources.0.paht=x", r"data\.sources\.0\.paht: unknown key"),
        ("run_dir.sub=x", r"run_dir is a plain value, it has no sub"),
    ],
)
def test_bad_overrides(tmp_path: Path, raw: dict[str, Any], override: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected) as refused:
        load_config(_write(tmp_path, raw), [override])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("train.max_steps", 1.5, "int"),
        ("train.max_steps", True, "int"),
        ("train.max_steps", None, "int"),
        ("train.learning_rate", "fast", "float"),
        ("train.learning_rate", True, "float"),
        ("train.gradient_clipping", float("inf"), "float"),
        ("train.weight_decay", float("nan"), "float"),
        ("train.resume", "no", "bool"),
        ("run_dir", 3, "str"),
        ("model.lora.target_modules", "q_proj", "list"),
        ("model.lora", [1], "mapping"),
        ("model.rope_parameters", "linear", "mapping"),
        ("data.sources", {"path": "x"}, "list"),
        ("teacher.window", 1.5, "int or str"),
        ("objective.layers", 3, "str or tuple"),
        ("objective.relations", {"qq": "much"}, "float"),
        ("metrics.peak_tflops", "big", "float"),
    ],
)
def test_wrong_types(raw: dict[str, Any], key: str, value: Any, kind: str) -> None:
    message = refusal(changed(raw, {key: value}))
    assert re.match(rf"{re.escape(key)}[.\w]*: expected (a )?{kind}", message)


def test_windows_and_layers_are_resolved(raw: dict[str, Any]) -> None:
    def window(value: Any, seq_len: int = 64) -> int:
        config = from_dict(changed(raw, {"teacher.window": value, "data.seq_len": seq_len}))
        return configuration.teacher_window(config, 16)

    assert [window("native"), window("full"), window(24), window("native", 8)] == [16, 64, 24, 8]

    def layers(value: Any) -> tuple[int, ...]:
        return configuration.layers_of(from_dict(changed(raw, {"objective.layers": value})), 4)

    assert [layers("all"), layers("last"), layers([2, 0])] == [(0, 1, 2, 3), (3,), (2, 0)]
