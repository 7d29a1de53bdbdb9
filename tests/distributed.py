"""Runs a function on several gloo processes, and builds what the distributed tests train."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from linearard.train import leave

VOCAB, SEQ_LEN, NATIVE = 96, 64, 16


def run(world_size: int, function: Callable[..., None], folder: Path, *arguments: Any) -> None:
    """Calls `function(*arguments)` on `world_size` new processes that know each other; waits, re-raises failures."""
    folder.mkdir(parents=True, exist_ok=True)
    mp.spawn(_process, (world_size, str(folder / "rendezvous"), function, arguments), nprocs=world_size)


def _process(rank: int, world_size: int, rendezvous: str, function: Callable[..., None], arguments: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), DS_ACCELERATOR="cpu")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    try:
        function(*arguments)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    leave(0)


def tiny_model(kind: str, folder: Path, **changes: Any) -> Path:
    """Writes a random model of a few thousand parameters, with weights large enough that attention is not flat."""
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    classes: dict[str, Any] = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }
    config_class, model_class = classes[kind]
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": NATIVE,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    model_class(config_class(**{**shape, **changes})).save_pretrained(folder)
    return folder


def ds_json(folder: Path, stage: int) -> str:
    """A DeepSpeed configuration file of a ZeRO stage; small buckets, so that several are used."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"zero{stage}.json"
    zero: dict[str, Any] = {"stage": stage, "reduce_scatter": True, "contiguous_gradients": True, "overlap_comm": False}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 100, "stage3_prefetch_bucket_size": 2000}
    temporary = folder / f".zero{stage}-{os.getpid()}"  # ranks write it side by side
    temporary.write_text(json.dumps({"zero_optimization": zero, "bf16": {"enabled": "auto"}}))
    os.replace(temporary, path)
    return str(path)


def raw_config(model: Path, run_dir: Path, **sections: Any) -> dict[str, Any]:
    """A configuration for the tiny models; sections are merged over the defaults."""
    raw: dict[str, Any] = {
        "run_dir": str(run_dir),
        "deepspeed": ds_json(run_dir, 3),
        "model": {
            "path": str(model),
            "rope_parameters": {"rope_type": "linear", "factor": 8.0},
            "trainable": "lora",
            "lora": {"r": 4, "alpha": 8.0, "dropout": 0.0},
            "precision": "fp32",
        },
        "objective": {"relations": {"qq": 1.0, "kk": 0.7, "vv": 0.5, "qk": 0.3}, "next_token": 0.4, "logits_kl": 0.2},
        "data": {"sources": [{"path": str(model)}], "seq_len": SEQ_LEN},
        "train": {"learning_rate": 1e-3, "warmup_steps": 0, "gradient_clipping": 0.5, "max_steps": 10},
        "metrics": {"progress": False, "tensorboard": False},
    }
    for key, value in sections.items():
        raw[key] = {**raw[key], **value} if isinstance(value, dict) and key in raw else value
    return raw


def batch(generator: torch.Generator, rows: int) -> dict[str, torch.Tensor]:
    """Host batch [rows, SEQ_LEN]: three documents a row of differing lengths, padding at the end of some rows."""
    from linearard.layout import positions_of

    ids = torch.randint(3, VOCAB, (rows, SEQ_LEN), generator=generator)
    segments = torch.zeros_like(ids)
    for row in range(rows):
        segments[row, 21 + row :] = 1
        segments[row, 23 + 2 * row :] = 2
        if row % 2 == 0:
            segments[row, SEQ_LEN - 5 :] = -1
    labels = torch.full_like(ids, -100)
    same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] >= 0)
    labels[:, :-1] = torch.where(same, ids[:, 1:], -100)
    return {"input_ids": ids, "labels": labels, "segment_ids": segments, "position_ids": positions_of(segments)}
