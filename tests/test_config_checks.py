"""Settings that cannot work are refused by name, whatever else stands in the configuration."""

from __future__ import annotations

import re
from typing import Any

import pytest
from changed_config import changed, refusal

from linearard import config as configuration
from linearard.config import from_dict

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
    assert re.search(expected, refusal(changed(raw, changes)))


def test_reentrant_is_no_matter_without_checkpointing(raw: dict[str, Any]) -> None:
    changes = {"model.gradient_checkpointing": False, "model.gradient_checkpointing_kwargs": {"use_reentrant": True}}
    configuration.check(from_dict(changed(raw, changes)))
