"""Loading a base model and choosing what of it is trained."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from linearard.capture import ATTENTION
from linearard.config import Config, LoraConfig, ModelConfig, ModelShape
from linearard.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def load_model_config(model: ModelConfig) -> PretrainedConfig:
    """The base's configuration; weights are not touched.

    Raises:
        UserError: no such model, unreadable, or not a decoder with grouped-query attention fields.
    """
    if model.path.startswith(("/", "./", "../", "~")) and not Path(model.path).exists():
        raise UserError(f"model.path: {model.path}: no such folder; name a model folder or a Hugging Face model")
    try:
        config = AutoConfig.from_pretrained(model.path, revision=model.revision)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise UserError(f"model.path: {model.path}: cannot load its config.json: {_first_line(error)}") from None
    for name in ("num_attention_heads", "num_hidden_layers", "hidden_size", "max_position_embeddings"):
        if getattr(config, name, None) is None:
            raise UserError(f"model.path: {model.path}: config.json has no {name}; use a decoder-only RoPE model")
    if getattr(config, "num_key_value_heads", None) is None:
        config.num_key_value_heads = config.num_attention_heads
    if getattr(config, "attention_dropout", 0.0):
        raise UserError(f"model.path: {model.path}: attention_dropout must be 0 in config.json")
    if model.disable_sliding_window and _sliding_window(config) is not None:
        config.sliding_window = None
        if hasattr(config, "use_sliding_window"):
            config.use_sliding_window = False
        if getattr(config, "layer_types", None):
            config.layer_types = ["full_attention"] * config.num_hidden_layers
    return config


def _sliding_window(config: PretrainedConfig) -> int | None:
    if not getattr(config, "use_sliding_window", True):  # Qwen2 carries a width that it does not use
        return None
    layer_types = getattr(config, "layer_types", None)
    if layer_types and "sliding_attention" not in layer_types:
        return None
    return getattr(config, "sliding_window", None)


def shape_of(config: PretrainedConfig) -> ModelShape:
    """The numbers that `linearard.config.check_against_model` looks at."""
    return ModelShape(
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        max_position_embeddings=config.max_position_embeddings,
        sliding_window=_sliding_window(config),
    )


def load_model(config: Config, model_config: PretrainedConfig) -> nn.Module:
    """The base's weights under `model_config`, with LinearARD's attention; frozen, in evaluation mode.

    Under a live `HfDeepSpeedConfig` of stage 3 the parameters are partitioned while they are loaded.

    Raises:
        UserError: weights missing or unreadable, or a model that does not go through AttentionInterface.
    """
    model_config = copy.deepcopy(model_config)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            config.model.path,
            revision=config.model.revision,
            config=model_config,
            dtype=DTYPES[config.model.precision],
            attn_implementation=ATTENTION,
            output_loading_info=True,
        )
    except (OSError, ValueError, EOFError, IndexError, pickle.UnpicklingError) as error:  # the last ones: damaged .bin
        raise UserError(f"model.path: {config.model.path}: cannot be loaded: {_first_line(error)}") from None
    except Exception as error:  # safetensors raises its own error class for a truncated file
        if type(error).__module__.startswith("safetensors"):
            raise UserError(f"model.path: {config.model.path}: unreadable weights: {_first_line(error)}") from None
        if isinstance(error, RuntimeError) and "mismatch" in str(error):
            raise UserError(
                f"model.path: {config.model.path}: weights and config.json have different shapes; restore the one "
                "that belongs to the other"
            ) from None
        raise
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:  # transformers fills them with random numbers and only warns
        raise UserError(
            f"model.path: {config.model.path}: {len(missing)} weights are missing, the first is {missing[0]}; "
            "restore the model's files"
        )
    model.config.use_cache = False
    return model.requires_grad_(False).eval()


def make_trainable(model: nn.Module, config: Config) -> nn.Module:
    """Adds adapters or unfreezes weights, and turns gradient checkpointing on; returns the student.

    Raises:
        UserError: no module has a name in model.lora.target_modules, or the model has no q/k/v projections.
    """
    choice: Any = config.model
    if choice.gradient_checkpointing:
        student: Any = model
        student.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={**choice.gradient_checkpointing_kwargs, "use_reentrant": False}
        )
    if choice.trainable == "lora":
        return _add_lora(model, choice.lora)
    model.train()
    if choice.trainable == "full":
        return model.requires_grad_(True)
    found = [m for name, m in model.named_modules() if name.rpartition(".")[2] in PROJECTIONS]
    if not found:
        raise UserError("model.trainable: qkv, but the model has no modules named q_proj, k_proj, v_proj; use full")
    for module in found:
        module.requires_grad_(True)
    return model


def _add_lora(model: Any, lora: LoraConfig) -> PeftModel:
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    missing = [name for name in lora.target_modules if name not in names]
    if missing:
        raise UserError(f"model.lora.target_modules: the model has no module named {', '.join(missing)}")
    student = get_peft_model(model, peft_config(lora), autocast_adapter_dtype=False)
    # Adapters come in fp32 beside a bf16 base; ZeRO-3 wants one dtype.
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(model.dtype)
    student.train()
    assert isinstance(student, PeftModel)
    return student


def peft_config(lora: LoraConfig) -> PeftLoraConfig:
    """PEFT's form of our LoRA settings."""
    return PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        bias="none",
        task_type="CAUSAL_LM",
    )


@contextlib.contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Within: the frozen base alone.

    Not `PeftModel.disable_adapter`, which also turns requires_grad off and on again under ZeRO's hooks.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
