"""Rotary position embeddings: the native ones of the teacher and the scaled ones of the student.

Frequencies are Hugging Face's own (`transformers.modeling_rope_utils`); here they are only chosen, checked and kept
in fp32. `rope_type` dynamic and longrope depend on the sequence length: the student's are fixed at the length of
training, so that a shard of a sequence rotates as the whole sequence does.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from linearard.errors import UserError

# What each type takes besides rope_type, factor, rope_theta and partial_rotary_factor.
TYPE_KEYS = {
    "linear": (),
    "dynamic": (),
    "yarn": (
        "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
        "truncate",
    ),
    "llama3": ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "longrope": ("original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"),
}  # fmt: skip


def scaled_config(native: PretrainedConfig, rope_parameters: dict[str, Any], existing_rope: str) -> PretrainedConfig:
    """The student's configuration: `native` with scaled RoPE and the matching max_position_embeddings.

    Args:
        native: configuration of the base model.
        rope_parameters: Hugging Face's keys, such as {"rope_type": "linear", "factor": 8.0}; rope_theta and
            original_max_position_embeddings default to the base's.
        existing_rope: "refuse" a base whose RoPE is scaled already, or "compose" linear with linear.

    Raises:
        UserError: no RoPE, unknown type, missing or contradictory keys.
    """
    base = native_rope_parameters(native)
    wanted = dict(rope_parameters)
    rope_type = wanted.get("rope_type")
    if rope_type not in tuple(TYPE_KEYS):
        raise UserError(f"model.rope_parameters.rope_type: {rope_type!r}; use one of {', '.join(TYPE_KEYS)}")
    known = ("rope_type", "factor", "rope_theta", "partial_rotary_factor", *TYPE_KEYS[rope_type])
    for key in wanted:
        if key not in known:
            raise UserError(f"model.rope_parameters.{key}: unknown key; {rope_type} takes {', '.join(known)}")
    if "factor" not in wanted:
        raise UserError("model.rope_parameters.factor: missing; give the stretch of the context, such as 8.0")
    try:
        factor = float(wanted["factor"])
    except (TypeError, ValueError):
        raise UserError(f"model.rope_parameters.factor: {wanted['factor']!r} is not a number") from None
    if not 1 < factor < math.inf:
        raise UserError(
            f"model.rope_parameters.factor: {factor} is no stretch, the student would equal its teacher; use over 1"
        )
    wanted["factor"] = factor
    existing = base.get("rope_type", "default")
    if existing != "default":
        if existing_rope != "compose":
            raise UserError(
                f"model.existing_rope: the base's RoPE is scaled already ({existing}, factor {base.get('factor')}); "
                "set it to compose (linear with linear), or start from an unscaled base"
            )
        if existing != "linear" or rope_type != "linear":
            raise UserError(
                f"model.existing_rope: {existing} and {rope_type} do not compose; only linear with linear does"
            )
        wanted["factor"] = factor * float(base["factor"])
    wanted.setdefault("rope_theta", base.get("rope_theta"))
    if "partial_rotary_factor" in base:
        wanted.setdefault("partial_rotary_factor", base["partial_rotary_factor"])
    length = native.max_position_embeddings
    if rope_type in ("yarn", "llama3", "longrope"):
        original = wanted.setdefault("original_max_position_embeddings", length)
        if original != length:
            raise UserError(
                f"model.rope_parameters.original_max_position_embeddings: {original} is not the base's "
                f"max_position_embeddings {length}; leave it out"
            )
    config = copy.deepcopy(native)
    config.rope_parameters = wanted
    # Dynamic scaling reads max_position_embeddings as the native length: it must stay.
    if rope_type != "dynamic":
        config.max_position_embeddings = round(length * factor)
    try:
        rope_frequencies_check(config)
    except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"model.rope_parameters: missing or wrong for rope_type {rope_type}: {error}") from None
    return config


def native_rope_parameters(config: PretrainedConfig) -> dict[str, Any]:
    """The base's rope_parameters.

    Raises:
        UserError: the model has no RoPE, or one per layer type.
    """
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        raise UserError(f"model.path: {config.model_type} has no RoPE; use a RoPE model such as Llama, Mistral or Qwen")
    if "rope_type" not in parameters:
        raise UserError(f"model.path: {config.model_type} has several RoPEs, one per layer type; this is not supported")
    return dict(parameters)


def rope_frequencies_check(config: PretrainedConfig) -> None:
    """Computes the frequencies once, so that a missing key is found before a model is loaded."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = copy.deepcopy(config)
    rope_type = config.rope_parameters["rope_type"]
    for seq_len in (2, config.max_position_embeddings + 1):  # longrope has a list of factors for each
        inv_freq, _ = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"), seq_len=seq_len)
        if not (torch.isfinite(inv_freq) & (inv_freq > 0)).all():
            raise ValueError("frequencies are not finite and positive")
        for key in ("short_factor", "long_factor") if rope_type == "longrope" else ():
            factors = config.rope_parameters[key]
            if not isinstance(factors, list) or len(factors) != inv_freq.numel():
                raise ValueError(f"{key} must be a list of {inv_freq.numel()} numbers")


def _rotary(model: nn.Module) -> nn.Module:
    found = [m for name, m in model.named_modules() if name.rpartition(".")[2] == "rotary_emb"]
    if len(found) != 1 or not hasattr(found[0], "inv_freq"):
        raise UserError(
            f"model.path: expected one rotary embedding shared by all layers, found {len(found)}; "
            "use a RoPE model such as Llama, Mistral or Qwen"
        )
    return found[0]


def _fixed_rotary(kind: type[nn.Module], config: PretrainedConfig, seq_len: int, device: torch.device) -> nn.Module:
    """A rotary module of the model's own class whose fp32 frequencies are those of `seq_len` and never change."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rotary: Any = kind(config=copy.deepcopy(config))
    rope_type = config.rope_parameters["rope_type"]
    if rope_type != "default":
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"), seq_len=seq_len)
        rotary.inv_freq, rotary.attention_scaling = inv_freq, scaling
    rotary.rope_type = "default"  # Hugging Face's wrapper recomputes the frequencies of other types from each shard
    return rotary.to(device=device, dtype=torch.float32)


class RopeSwitch:
    """Gives one model two RoPEs: the scaled one normally, the native one inside `native()`.

    Both are kept in fp32 outside the module tree: `engine.module.bfloat16()` and ZeRO's patched constructors round
    the model's own buffers. The model's rotary module stays where it is; only what it computes is replaced.
    """

    def __init__(
        self,
        model: nn.Module,
        native: PretrainedConfig,
        scaled: PretrainedConfig,
        seq_len: int,
        device: torch.device,
    ) -> None:
        """Installs the switch in `model`.

        Raises:
            UserError: no single rotary embedding, or the scaled frequencies equal the native ones at `seq_len`.
        """
        rotary = _rotary(model)
        self._native = _fixed_rotary(type(rotary), native, seq_len, device)
        self._scaled = _fixed_rotary(type(rotary), scaled, seq_len, device)
        self._active = self._scaled
        rotary.forward = self._forward  # type: ignore[method-assign]
        if self.largest_difference() < 1e-6:
            raise UserError(
                f"model.rope_parameters: the student's frequencies equal the teacher's at {seq_len} tokens; "
                "use a larger factor, another rope_type or longer sequences"
            )

    def largest_difference(self) -> float:
        """Largest relative difference of inv_freq, or of the attention scaling, between student and teacher."""
        native: Any = self._native
        scaled: Any = self._scaled
        frequencies = ((scaled.inv_freq - native.inv_freq) / native.inv_freq).abs().max().item()
        return max(frequencies, abs(scaled.attention_scaling - native.attention_scaling))

    @contextmanager
    def native(self) -> Iterator[None]:
        """Within: the teacher's RoPE."""
        self._active = self._native
        try:
            yield
        finally:
            self._active = self._scaled

    def make_native(self) -> None:
        """The native RoPE from now on: a teacher that has the model for itself."""
        self._active = self._scaled = self._native

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._active(*args, **kwargs)
