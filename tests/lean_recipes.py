"""What the tests of the lean step train: recipes, tiny models for them, and engines that have left their base."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch
from distributed import batch, ds_json, raw_config, tiny_model

ROWS = 2
Case = dict[str, Any]
ALL = {"qq": 1.0, "kk": 0.7, "vv": 0.5, "qk": 0.3}

# What is trained, on which terms: one plain step each.
RECIPES: dict[str, Case] = {
    "relations": {"objective": {"relations": ALL}},
    "one pass, one key-value head": {
        "model": {"num_key_value_heads": 1}, "window": 24,
        "objective": {"relations": {"qk": 1.0, "vv": 1.0}, "next_token": 0.4},
    },
    "all terms": {"objective": {"relations": ALL, "next_token": 0.4, "logits_kl": 0.2}},
    "tied, everything trained": {
        "kind": "qwen2", "model": {"tie_word_embeddings": True}, "training": {"trainable": "full"}, "window": 24,
        "objective": {"relations": {"qk": 1.0, "kk": 0.5}, "next_token": 0.6, "logits_kl": 0.3, "layers": [0, 2]},
    },
    "q/k/v, one relation of the first layers": {
        "kind": "mistral", "model": {"sliding_window": None}, "training": {"trainable": "qkv"}, "window": "full",
        "objective": {"relations": {"qq": 1.0}, "layers": [0, 1]},
    },
    "q/k norms, everything trained on relations": {
        "kind": "qwen3", "model": {"head_dim": 16}, "training": {"trainable": "full"}, "window": 24,
        "objective": {"relations": ALL, "layers": [1]},
    },
    "next token alone": {"training": {"trainable": "full"}, "objective": {"relations": {}, "next_token": 1.0}},
    "adapters behind and on the head": {
        "training": {"lora": {"r": 3, "alpha": 4.0, "dropout": 0.0, "target_modules": ["q_proj", "o_proj", "lm_head"]}},
        "objective": {"relations": {"vv": 2.0, "qq": 0.5}, "next_token": 0.3, "logits_kl": 0.5},
    },
}  # fmt: skip
DEPTHS = (3, 6)
for _layers in DEPTHS:  # q, k, v of one size, which nothing else but attention's result has
    RECIPES[f"{_layers} layers"] = {
        "model": {"num_hidden_layers": _layers, "num_key_value_heads": 4, "head_dim": 16},
        "objective": {"relations": ALL},
    }
RELATIONS, ONE_PASS, ALL_TERMS, TIED, QKV, NORMS, NEXT, HEAD = list(RECIPES)[:8]


def case_of(recipe: str, teacher: str, tensors: str, stage: int, checkpointing: bool = True, **more: Any) -> Case:
    """A way to take the step of a recipe."""
    case = {"recipe": recipe, "teacher": teacher, "tensors": tensors, "stage": stage, "checkpointing": checkpointing}
    return {**case, "relation_parallel": "auto", **more}


def name_of(case: Case) -> str:
    """The case in words, also the key of its results."""
    return ", ".join(f"{key} {value}" for key, value in case.items())


def write_models(folder: Path) -> dict[str, str]:
    """A model for each recipe: name of the recipe -> folder."""
    found = {}
    for number, (name, recipe) in enumerate(RECIPES.items()):
        shape = {"num_hidden_layers": 3, **recipe.get("model", {})}
        found[name] = str(tiny_model(recipe.get("kind", "llama"), folder / str(number), **shape))
    return found


def build(case: Case, models: dict[str, str], folder: Path, context: Any) -> Any:
    """An engine whose trained weights have left the base, alike on every number of ranks."""
    import deepspeed

    from linearard import config as configuration
    from linearard.engine import Engine
    from linearard.models.student import load_model_config

    recipe = RECIPES[case["recipe"]]
    raw = raw_config(
        Path(models[case["recipe"]]),
        folder,
        deepspeed=ds_json(folder, case["stage"]),
        teacher={"kind": case["teacher"], "window": recipe.get("window", 16), "tensors": case["tensors"]},
        parallel={"sequence_parallel_size": context.world_size, "relation_parallel": case["relation_parallel"]},
    )
    raw["objective"] = recipe["objective"]
    raw["model"] |= {"gradient_checkpointing": case["checkpointing"], **recipe.get("training", {})}
    accumulation = case.get("accumulation", 1)
    raw["train"] |= {"micro_batch_size": ROWS // accumulation, "gradient_accumulation_steps": accumulation}
    config = configuration.from_dict(raw)
    configuration.check(config)
    engine = Engine(config, load_model_config(config.model), context)
    for name, p in engine.module.named_parameters():
        if p.requires_grad:
            with deepspeed.zero.GatheredParameters([p], modifier_rank=0), torch.no_grad():
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))))
    return engine


def one_batch(seed: int = 1) -> dict[str, torch.Tensor]:
    """ROWS packed sequences of one step."""
    return batch(torch.Generator().manual_seed(seed), ROWS)
