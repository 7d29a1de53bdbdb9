"""Configurations against the model that they name: shapes, sliding windows, RoPE that is there already."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from changed_config import changed, refusal
from distributed import tiny_model
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from linearard import config as configuration
from linearard.config import from_dict
from linearard.errors import UserError
from linearard.models.rope import RopeSwitch, scaled_config
from linearard.models.student import load_model_config, shape_of
from linearard.trainer import check_run


def _refusal_with(tmp_path: Path, raw: dict[str, Any], model: dict[str, Any], changes: dict[str, Any]) -> str:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model))
    return refusal(changed(raw, {"model.path": str(folder), **changes}))


SMALL = {"hidden_size": 48, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 96}
SMALL |= {"max_position_embeddings": 16}


def test_key_value_heads_and_ranks_must_divide(tmp_path: Path, raw: dict[str, Any]) -> None:
    model = {"model_type": "llama", **SMALL, "num_attention_heads": 12, "num_key_value_heads": 3}
    message = _refusal_with(tmp_path, raw, model, {"parallel.sequence_parallel_size": 4})
    assert re.search(r"^parallel\.sequence_parallel_size: 4 .*3 key-value heads do not divide each other; use", message)


def test_more_ranks_than_key_value_heads_are_fine(raw: dict[str, Any]) -> None:
    config = from_dict(changed(raw, {"parallel.sequence_parallel_size": 4}))
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
    message = refusal(changed(raw, {"model.path": "/no/such/model"}))
    assert message == "model.path: /no/such/model: no such folder; name a model folder or a Hugging Face model"
    assert re.match(
        r"model\.path: no-one/nothing: cannot load", refusal(changed(raw, {"model.path": "no-one/nothing"}))
    )


def test_existing_linear_rope_composes_with_linear_only(tmp_path: Path, raw: dict[str, Any]) -> None:
    scaled = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
    base = tiny_model("llama", tmp_path / "scaled", rope_parameters=scaled, max_position_embeddings=64)
    compose = {"model.path": str(base), "model.existing_rope": "compose"}
    config = from_dict(changed(raw, compose))
    native = load_model_config(config.model)
    student = scaled_config(native, config.model.rope_parameters, "compose")
    assert student.rope_parameters == {"rope_type": "linear", "factor": 32.0, "rope_theta": 500.0}
    assert student.max_position_embeddings == 512
    assert native.rope_parameters == scaled  # the base's configuration is left alone
    yarn = {"model.rope_parameters": {"rope_type": "yarn", "factor": 2}}
    assert re.match(r"model\.existing_rope: linear and yarn do not compose", refusal(changed(raw, {**compose, **yarn})))


def test_sliding_windows(tmp_path: Path, raw: dict[str, Any]) -> None:
    short = tiny_model("mistral", tmp_path / "short", sliding_window=32)
    long = tiny_model("mistral", tmp_path / "long", sliding_window=64)
    message = refusal(changed(raw, {"model.path": str(short)}))
    assert re.match(r"model\.disable_sliding_window: .*window of 32 tokens, shorter than 64; set it to true", message)
    for changes in (
        {"model.path": str(long)},
        {"model.path": str(short), "model.disable_sliding_window": True},
        {"model.path": str(short), "data.seq_len": 32},
    ):
        config = from_dict(changed(raw, changes))
        check_run(config, load_model_config(config.model))
    # An evaluation beyond the window would run past it, too.
    message = refusal(changed(raw, {"model.path": str(long), "evaluation.multiples": [1, 8]}))
    assert re.match(r"model\.disable_sliding_window: .*of 64 tokens, shorter than 128", message)
    config = from_dict(changed(raw, {"model.path": str(short), "model.disable_sliding_window": True}))
    assert load_model_config(config.model).sliding_window is None
    as_it_is = dataclasses.replace(config.model, disable_sliding_window=False)
    assert shape_of(load_model_config(as_it_is)).sliding_window == 32


def test_a_width_that_qwen2_does_not_use_is_no_window(tmp_path: Path, raw: dict[str, Any]) -> None:
    base = tiny_model("qwen2", tmp_path / "qwen2", sliding_window=8, use_sliding_window=False)
    config = from_dict(changed(raw, {"model.path": str(base)}))
    check_run(config, load_model_config(config.model))
    used = tiny_model("qwen2", tmp_path / "used", sliding_window=8, use_sliding_window=True, max_window_layers=1)
    assert re.match(r"model\.disable_sliding_window: ", refusal(changed(raw, {"model.path": str(used)})))


@pytest.mark.parametrize(("seq_len", "refused"), [(16, True), (12, True), (17, False), (64, False)])
def test_dynamic_scaling_at_the_native_length_is_no_scaling(raw: dict[str, Any], seq_len: int, refused: bool) -> None:

    config = from_dict(changed(raw, {"model.rope_parameters.rope_type": "dynamic"}))
    native = load_model_config(config.model)
    scaled = scaled_config(native, config.model.rope_parameters, "refuse")
    holder = nn.Module()
    holder.rotary_emb = LlamaRotaryEmbedding(config=native)
    if refused:
        with pytest.raises(UserError, match=rf"equal the teacher's at {seq_len} tokens; use a larger factor, another"):
            RopeSwitch(holder, native, scaled, seq_len, torch.device("cpu"))
    else:
        assert RopeSwitch(holder, native, scaled, seq_len, torch.device("cpu")).largest_difference() > 1e-3
