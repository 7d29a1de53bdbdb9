"""Reading, overriding and refusing configurations; the files that ship."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from distributed import raw_config, tiny_model

from linearard import config as configuration
from linearard import ds_config
from linearard.config import Config, from_dict, load_config
from linearard.errors import UserError
from linearard.models.rope import RopeSwitch, scaled_config
from linearard.models.student import load_model_config, shape_of
from linearard.trainer import check_run

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = sorted((ROOT / "launch").glob("*.yaml"))
DS_CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))


@pytest.fixture
def raw(tmp_path: Path, llama: Path) -> dict[str, Any]:
    return raw_config(llama, tmp_path / "run")


def _write(tmp_path: Path, raw: dict[str, Any]) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def _set(raw: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of `raw` with dotted keys set."""
    raw = json.loads(json.dumps(raw))
    for key, value in changes.items():
        node = raw
        *folders, last = key.split(".")
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = value
    return raw


def _refusal(raw: dict[str, Any]) -> str:
    """The message that the whole chain of checks gives: reading, then everything that needs no weights."""
    with pytest.raises(UserError) as refused:
        config = from_dict(raw)
        configuration.check(config)
        check_run(config, load_model_config(config.model))
    message = str(refused.value)
    assert "\n" not in message
    return message


# ------------------------------------------------------------------------------------------------ reading


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
    message = _refusal(_set(raw, {key: value}))
    assert re.match(rf"{re.escape(key)}[.\w]*: expected (a )?{kind}", message)


# ----------------------------------------------------------------------------------------------- refusing

IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    # what is missing
    ({"run_dir": ""}, r"^run_dir: missing; name"),
    ({"model.path": ""}, r"^model\.path: missing; name"),
    ({"data.sources": []}, r"^data\.sources: empty; list"),
    ({"data.sources": [{"path": "a", "name": "b"}]}, r"^data\.sources\.0: give exactly one"),
    ({"data.sources": [{"format": "text"}]}, r"^data\.sources\.0: give exactly one"),
    ({"data.sources": [{"path": "/no/such/place"}]}, r"^data\.sources\.0\.path: /no/such/place: no such"),
    # unknown words
    ({"model.trainable": "adapters"}, r"^model\.trainable: 'adapters' is not known; use one of lora, qkv, full"),
    ({"model.precision": "fp16"}, r"^model\.precision: 'fp16' .*bf16, fp32"),
    ({"model.existing_rope": "ignore"}, r"^model\.existing_rope: 'ignore'.*refuse, compose"),
    ({"teacher.kind": "ema"}, r"^teacher\.kind: 'ema'.*auto, shared, replica"),
    ({"teacher.tensors": "host"}, r"^teacher\.tensors: 'host'.*auto, keep, recompute, offload"),
    ({"teacher.window": "long"}, r"^teacher\.window: 'long'.*native, full"),
    ({"objective.relations": {"kv": 1.0}}, r"^objective\.relations: 'kv'.*qq, kk, vv, qk"),
    ({"objective.layers": "first"}, r"^objective\.layers: 'first'.*all, last"),
    ({"data.packing": "none"}, r"^data\.packing: 'none'.*documents, stream"),
    ({"data.sources": [{"path": ".", "role": "test"}]}, r"^data\.sources\.0\.role: 'test'"),
    ({"parallel.relation_parallel": "ring"}, r"^parallel\.relation_parallel: 'ring'"),
    ({"model.rope_parameters.fcator": 3}, r"^model\.rope_parameters\.fcator: unknown key; linear takes rope_type, "),
    # numbers out of range
    ({"train.max_steps": 0}, r"^train\.max_steps: 0 is too small; use 1 or more"),
    ({"train.gradient_accumulation_steps": 0}, r"^train\.gradient_accumulation_steps: 0"),
    ({"train.keep_checkpoints": 0}, r"^train\.keep_checkpoints: 0"),
    ({"train.learning_rate": 0}, r"^train\.learning_rate: 0\.0 must be above 0"),
    ({"train.warmup_steps": 10}, r"^train\.warmup_steps: 10 leaves no step of train\.max_steps 10"),
    ({"train.min_lr_ratio": 1.5}, r"^train\.min_lr_ratio: 1\.5 is not in"),
    ({"train.gradient_clipping": -1}, r"^train\.gradient_clipping: -1"),
    ({"train.adam_beta1": 1.0}, r"^train\.adam_beta1: 1\.0 is not in"),
    ({"train.adam_beta2": -0.5}, r"^train\.adam_beta2: -0\.5 is not in"),
    ({"train.seed": -1}, r"^train\.seed: -1"),
    ({"model.lora.r": 0}, r"^model\.lora\.r: 0"),
    ({"model.lora.alpha": 0}, r"^model\.lora\.alpha: 0\.0 must be above 0"),
    ({"model.lora.dropout": 1.0}, r"^model\.lora\.dropout: 1\.0"),
    ({"model.lora.target_modules": []}, r"^model\.lora\.target_modules: empty"),
    ({"objective.next_token": -0.1}, r"^objective\.next_token: -0\.1"),
    ({"objective.relations": {"qq": -1.0}}, r"^objective\.relations\.qq: -1\.0"),
    ({"objective": {"relations": {"qq": 0.0}}}, r"^objective: every term has weight 0"),
    ({"objective.layers": []}, r"^objective\.layers: give all, last"),
    ({"objective.layers": [1, 1]}, r"^objective\.layers: give all, last"),
    ({"objective.layers": [-1]}, r"^objective\.layers: give all, last"),
    ({"data.seq_len": 1}, r"^data\.seq_len: 1"),
    ({"data.held_out_fraction": 1.0}, r"^data\.held_out_fraction: 1\.0"),
    ({"data.sources": [{"path": ".", "max_documents": 0}]}, r"^data\.sources\.0\.max_documents: 0"),
    ({"evaluation.multiples": [0]}, r"^evaluation\.multiples: "),
    ({"evaluation.max_windows": 0}, r"^evaluation\.max_windows: 0"),
    ({"metrics.peak_tflops": 0}, r"^metrics\.peak_tflops: 0\.0 must be above 0"),
    # combinations
    ({"parallel.sequence_parallel_size": 3}, r"^data\.seq_len: 64 is not divisible by parallel\.sequence_p.* 3;"),
    ({"parallel.sequence_parallel_size": 8}, r"^parallel\.sequence_parallel_size: 8 does not .* 4 attention"),
    ({"parallel.sequence_parallel_size": 0}, r"^parallel\.sequence_parallel_size: 0"),
    ({"teacher.window": 65}, r"^teacher\.window: 65 is longer than the context data\.seq_len 64"),
    ({"teacher.window": 0}, r"^teacher\.window: 0"),
    ({"teacher.kind": "shared", "model.trainable": "qkv"}, r"^teacher\.kind: shared .* is qkv; use replica"),
    ({"teacher.kind": "shared", "model.trainable": "full"}, r"^teacher\.kind: shared .*is full"),
    (
        {"model.gradient_checkpointing": True, "model.gradient_checkpointing_kwargs": {"use_reentrant": True}},
        r"^model\.gradient_checkpointing_kwargs\.use_reentrant: reentrant .*set it to false",
    ),
    ({"objective.layers": [0, 2]}, r"^objective\.layers: layer 2 does not exist; the model has layers 0 to 1"),
    # RoPE
    ({"model.rope_parameters": {}}, r"^model\.rope_parameters\.rope_type: None; use one of linear"),
    ({"model.rope_parameters": {"rope_type": "ntk", "factor": 2}}, r"rope_type: 'ntk'; use one of"),
    ({"model.rope_parameters": {"rope_type": "default", "factor": 2}}, r"rope_type: 'default'; use one of"),
    ({"model.rope_parameters": {"rope_type": "linear"}}, r"^model\.rope_parameters\.factor: missing; give"),
    ({"model.rope_parameters.factor": "big"}, r"^model\.rope_parameters\.factor: 'big' is not a number"),
    ({"model.rope_parameters.factor": 1}, r"^model\.rope_parameters\.factor: 1\.0 is no stretch, .*; use over 1"),
    ({"model.rope_parameters.factor": float("inf")}, r"^model\.rope_parameters\.factor: inf"),
    ({"model.rope_parameters.rope_type": "llama3"}, r"^model\.rope_parameters: missing or wrong .*low_freq_factor"),
    (
        {"model.rope_parameters": {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 8}},
        r"^model\.rope_parameters\.original_max_position_embeddings: 8 is not the base's .* 16; leave it out",
    ),
    (
        {"model.rope_parameters": {"rope_type": "longrope", "factor": 2, "short_factor": [1] * 4, "long_factor": [2]}},
        r"^model\.rope_parameters: missing or wrong .*long_factor must be a list of 4 numbers",
    ),
    (
        {"model.rope_parameters": {"rope_type": "longrope", "factor": 2, "short_factor": [1], "long_factor": [2] * 4}},
        r"^model\.rope_parameters: missing or wrong .*short_factor must be a list of 4 numbers",
    ),
]


@pytest.mark.parametrize(("changes", "expected"), IMPOSSIBLE, ids=[str(changes)[:60] for changes, _ in IMPOSSIBLE])
def test_impossible_settings_are_refused(raw: dict[str, Any], changes: dict[str, Any], expected: str) -> None:
    configuration.check(from_dict(raw))  # what all these start from is fine
    assert re.search(expected, _refusal(_set(raw, changes)))


def test_reentrant_is_no_matter_without_checkpointing(raw: dict[str, Any]) -> None:
    changes = {"model.gradient_checkpointing": False, "model.gradient_checkpointing_kwargs": {"use_reentrant": True}}
    configuration.check(from_dict(_set(raw, changes)))


# -------------------------------------------------------------------------------------- with another model


def _refusal_with(tmp_path: Path, raw: dict[str, Any], model: dict[str, Any], changes: dict[str, Any]) -> str:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model))
    return _refusal(_set(raw, {"model.path": str(folder), **changes}))


SMALL = {"hidden_size": 48, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 96}
SMALL |= {"max_position_embeddings": 16}


def test_key_value_heads_and_ranks_must_divide(tmp_path: Path, raw: dict[str, Any]) -> None:
    model = {"model_type": "llama", **SMALL, "num_attention_heads": 12, "num_key_value_heads": 3}
    message = _refusal_with(tmp_path, raw, model, {"parallel.sequence_parallel_size": 4})
    assert re.search(r"^parallel\.sequence_parallel_size: 4 .*3 key-value heads do not divide each other; use", message)


def test_more_ranks_than_key_value_heads_are_fine(raw: dict[str, Any]) -> None:
    config = from_dict(_set(raw, {"parallel.sequence_parallel_size": 4}))
    configuration.check(config)
    check_run(config, load_model_config(config.model))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"model_type": "gpt2", "n_head": 4, "n_layer": 2, "n_embd": 32}, r"model\.path: gpt2 has no RoPE"),
        ({"model_type": "vit"}, r"model\.path: .*config\.json has no max_position_embeddings; use a decoder-only"),
        ({"model_type": "no_such"}, r"model\.path: .*cannot load its config\.json: .*no_such"),
        ({}, r"model\.path: .*cannot load its config\.json: .*model_type"),
        (
            {"model_type": "llama", **SMALL, "num_attention_heads": 5},
            r"model\.path: .*cannot load its config\.json: .*hidden size \(48\)",
        ),
        (
            {"model_type": "llama", **SMALL, "num_attention_heads": 4, "attention_dropout": 0.1},
            r"model\.path: .*attention_dropout must be 0",
        ),
        (
            {"model_type": "gemma3_text", **SMALL, "num_attention_heads": 4, "num_key_value_heads": 4},
            r"model\.(path|disable_sliding_window): ",
        ),
        (
            {
                "model_type": "llama", **SMALL, "num_attention_heads": 4,
                "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
            },
            r"model\.existing_rope: .*scaled already \(linear, factor 4\.0\); set it to compose",
        ),
    ],
    ids=["gpt2", "vit", "unknown", "empty", "heads", "dropout", "gemma3", "scaled"],
)  # fmt: skip
def test_models_that_cannot_be_stretched(tmp_path: Path, raw: dict[str, Any], model: Any, expected: str) -> None:
    assert re.match(expected, _refusal_with(tmp_path, raw, model, {}))


def test_a_model_folder_that_is_not_there(raw: dict[str, Any]) -> None:
    message = _refusal(_set(raw, {"model.path": "/no/such/model"}))
    assert message == "model.path: /no/such/model: no such folder; name a model folder or a Hugging Face model"
    assert re.match(r"model\.path: no-one/nothing: cannot load", _refusal(_set(raw, {"model.path": "no-one/nothing"})))


def test_existing_linear_rope_composes_with_linear_only(tmp_path: Path, raw: dict[str, Any]) -> None:
    scaled = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
    base = tiny_model("llama", tmp_path / "scaled", rope_parameters=scaled, max_position_embeddings=64)
    compose = {"model.path": str(base), "model.existing_rope": "compose"}
    config = from_dict(_set(raw, compose))
    native = load_model_config(config.model)
    student = scaled_config(native, config.model.rope_parameters, "compose")
    assert student.rope_parameters == {"rope_type": "linear", "factor": 32.0, "rope_theta": 500.0}
    assert student.max_position_embeddings == 512
    assert native.rope_parameters == scaled  # the base's configuration is left alone
    yarn = {"model.rope_parameters": {"rope_type": "yarn", "factor": 2}}
    assert re.match(r"model\.existing_rope: linear and yarn do not compose", _refusal(_set(raw, {**compose, **yarn})))


def test_sliding_windows(tmp_path: Path, raw: dict[str, Any]) -> None:
    short = tiny_model("mistral", tmp_path / "short", sliding_window=32)
    long = tiny_model("mistral", tmp_path / "long", sliding_window=64)
    message = _refusal(_set(raw, {"model.path": str(short)}))
    assert re.match(r"model\.disable_sliding_window: .*window of 32 tokens, shorter than 64; set it to true", message)
    for changes in (
        {"model.path": str(long)},
        {"model.path": str(short), "model.disable_sliding_window": True},
        {"model.path": str(short), "data.seq_len": 32},
    ):
        config = from_dict(_set(raw, changes))
        check_run(config, load_model_config(config.model))
    # An evaluation beyond the window would run past it, too.
    message = _refusal(_set(raw, {"model.path": str(long), "evaluation.multiples": [1, 8]}))
    assert re.match(r"model\.disable_sliding_window: .*of 64 tokens, shorter than 128", message)
    config = from_dict(_set(raw, {"model.path": str(short), "model.disable_sliding_window": True}))
    assert load_model_config(config.model).sliding_window is None
    as_it_is = dataclasses.replace(config.model, disable_sliding_window=False)
    assert shape_of(load_model_config(as_it_is)).sliding_window == 32


def test_a_width_that_qwen2_does_not_use_is_no_window(tmp_path: Path, raw: dict[str, Any]) -> None:
    base = tiny_model("qwen2", tmp_path / "qwen2", sliding_window=8, use_sliding_window=False)
    config = from_dict(_set(raw, {"model.path": str(base)}))
    check_run(config, load_model_config(config.model))
    used = tiny_model("qwen2", tmp_path / "used", sliding_window=8, use_sliding_window=True, max_window_layers=1)
    assert re.match(r"model\.disable_sliding_window: ", _refusal(_set(raw, {"model.path": str(used)})))


@pytest.mark.parametrize(("seq_len", "refused"), [(16, True), (12, True), (17, False), (64, False)])
def test_dynamic_scaling_at_the_native_length_is_no_scaling(raw: dict[str, Any], seq_len: int, refused: bool) -> None:
    import torch
    from torch import nn
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = from_dict(_set(raw, {"model.rope_parameters.rope_type": "dynamic"}))
    native = load_model_config(config.model)
    scaled = scaled_config(native, config.model.rope_parameters, "refuse")
    holder = nn.Module()
    holder.rotary_emb = LlamaRotaryEmbedding(config=native)
    if refused:
        with pytest.raises(UserError, match=rf"equal the teacher's at {seq_len} tokens; use a larger factor, another"):
            RopeSwitch(holder, native, scaled, seq_len, torch.device("cpu"))
    else:
        assert RopeSwitch(holder, native, scaled, seq_len, torch.device("cpu")).largest_difference() > 1e-3


def test_windows_and_layers_are_resolved(raw: dict[str, Any]) -> None:
    def window(value: Any, seq_len: int = 64) -> int:
        config = from_dict(_set(raw, {"teacher.window": value, "data.seq_len": seq_len}))
        return configuration.teacher_window(config, 16)

    assert [window("native"), window("full"), window(24), window("native", 8)] == [16, 64, 24, 8]

    def layers(value: Any) -> tuple[int, ...]:
        return configuration.layers_of(from_dict(_set(raw, {"objective.layers": value})), 4)

    assert [layers("all"), layers("last"), layers([2, 0])] == [(0, 1, 2, 3), (3,), (2, 0)]


# ---------------------------------------------------------------------------------- the DeepSpeed JSON


def _ds(tmp_path: Path, raw: dict[str, Any], content: Any) -> Config:
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return from_dict(_set(raw, {"deepspeed": str(path)}))


ZERO3 = {"zero_optimization": {"stage": 3}}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({**ZERO3, "train_micro_batch_size_per_gpu": 4}, r'^train\.micro_batch_size: 1 contradicts .*: 4 in .*"auto"'),
        ({**ZERO3, "gradient_accumulation_steps": 2}, r"^train\.gradient_accumulation_steps: 1 contradicts .*: 2"),
        ({**ZERO3, "gradient_clipping": 1.0}, r"^train\.gradient_clipping: 0\.5 contradicts gradient_clipping: 1\.0"),
        ({**ZERO3, "sequence_parallel_size": 2}, r"^parallel\.sequence_parallel_size: 1 contradicts"),
        ({**ZERO3, "bf16": {"enabled": True}}, r"^model\.precision: fp32 contradicts bf16\.enabled: True"),
        ({**ZERO3, "bf16": True}, r"^deepspeed: .*bf16 must be an object"),
        ({**ZERO3, "fp16": {"enabled": True}}, r"^deepspeed: .*fp16 is not supported; remove it"),
        ({**ZERO3, "fp16": False}, r"^deepspeed: .*fp16 must be an object"),
        ({**ZERO3, "optimizer": {"type": "AdamW"}}, r"^deepspeed: .*remove optimizer; it is set by train\.learn"),
        ({**ZERO3, "scheduler": {"type": "WarmupLR"}}, r"^deepspeed: .*remove scheduler; it is set by train\.warmup"),
        ({**ZERO3, "train_batch_size": 16}, r"^deepspeed: .*remove train_batch_size; it is set by train\.micro"),
        ({**ZERO3, "prescale_gradients": True}, r"^deepspeed: .*remove prescale_gradients"),
        ({"zero_optimization": {"stage": 0}}, r"^deepspeed: .*stage must be 1, 2 or 3"),
        ({"zero_optimization": True}, r"^deepspeed: .*stage must be 1, 2 or 3"),
        ({}, r"^deepspeed: .*stage must be 1, 2 or 3"),
        ({"zero_optimization": {"stage": 3, "reduce_scatter": False}}, r"^deepspeed: .*reduce_scatter must be true"),
        ("[1, 2]", r"^deepspeed: .*must hold a JSON object"),
        ("{'stage': 3}", r"^deepspeed: .*cannot be read as JSON"),
    ],
)
def test_conflicting_deepspeed_files(tmp_path: Path, raw: dict[str, Any], content: Any, expected: str) -> None:
    config = _ds(tmp_path, raw, content)
    with pytest.raises(UserError, match=expected) as refused:
        ds_config.complete(config)
    assert "\n" not in str(refused.value)


def test_missing_deepspeed_file(raw: dict[str, Any]) -> None:
    message = _refusal(_set(raw, {"deepspeed": "nowhere.json"}))
    assert message == "deepspeed: nowhere.json: no such file; name one of ds_configs/*.json"


def test_agreeing_values_are_accepted_and_the_rest_completed(tmp_path: Path, raw: dict[str, Any]) -> None:
    content = {
        **ZERO3,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "optimizer": "auto",
        "steps_per_print": 7,
    }
    done = ds_config.complete(_ds(tmp_path, raw, content))
    assert done["train_micro_batch_size_per_gpu"] == 1 and done["gradient_accumulation_steps"] == 1
    assert done["gradient_clipping"] == 0.5 and done["sequence_parallel_size"] == 1
    assert done["zero_optimization"] == {"stage": 3, "reduce_scatter": True}
    assert done["bf16"] == {"enabled": False} and done["steps_per_print"] == 7
    assert not {"fp16", "optimizer", "scheduler", "train_batch_size"} & set(done)
    assert ds_config.zero_stage(done) == 3
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    teacher = ds_config.inference_only(ds_config.complete(_ds(tmp_path, raw, {"zero_optimization": zero})))
    assert set(teacher["zero_optimization"]) == {"stage", "offload_param", "reduce_scatter"}


# --------------------------------------------------------------------------------------- what ships


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
    done = ds_config.complete(from_dict(_set(raw, changes)))
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
    import sysconfig

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
