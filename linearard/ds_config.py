"""The DeepSpeed configuration: a ds_configs/*.json completed from the run's configuration.

A value that both sides own must be "auto" or absent in the JSON, or agree; a conflict is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from linearard.config import Config
from linearard.errors import UserError


def complete(config: Config) -> dict[str, Any]:
    """Reads `config.deepspeed` and fills in what the run's configuration owns.

    Returns:
        A dictionary for `deepspeed.initialize(config=...)`.

    Raises:
        UserError: file missing or not JSON, conflicting values, or settings that the trainer cannot honour.
    """
    path = Path(config.deepspeed)
    try:
        ds = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"deepspeed: {path}: no such file; name one of ds_configs/*.json") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"deepspeed: {path}: cannot be read as JSON: {error}") from None
    if not isinstance(ds, dict):
        raise UserError(f"deepspeed: {path}: must hold a JSON object")
    for key in ("bf16", "fp16"):
        if not isinstance(ds.get(key, {}), dict):
            raise UserError(
                f'deepspeed: {path}: {key} must be an object such as {{"enabled": "auto"}}, not {ds[key]!r}'
            )
    _refuse_unsupported(ds, path)
    train = config.train
    owned = {
        "train_micro_batch_size_per_gpu": (train.micro_batch_size, "train.micro_batch_size"),
        "gradient_accumulation_steps": (train.gradient_accumulation_steps, "train.gradient_accumulation_steps"),
        "gradient_clipping": (train.gradient_clipping, "train.gradient_clipping"),
        "sequence_parallel_size": (config.parallel.sequence_parallel_size, "parallel.sequence_parallel_size"),
    }
    for key, (value, field) in owned.items():
        if ds.get(key, "auto") not in ("auto", value):
            raise UserError(f'{field}: {value} contradicts {key}: {ds[key]} in {path}; write "auto" there')
        ds[key] = value
    bf16 = dict(ds.get("bf16", {}))
    wanted = config.model.precision == "bf16"
    if bf16.get("enabled", "auto") not in ("auto", wanted):
        raise UserError(
            f"model.precision: {config.model.precision} contradicts bf16.enabled: {bf16['enabled']} in {path}; "
            'write "auto" there'
        )
    ds["bf16"] = {**bf16, "enabled": wanted}
    zero = ds["zero_optimization"]
    # The trainer scales gradients for this way of averaging (engine.gradient_scale); it must not be left to defaults.
    zero.setdefault("reduce_scatter", True)
    # The optimizer is torch's own AdamW, also where its state is offloaded: no op is compiled.
    ds["zero_allow_untested_optimizer"] = True
    ds.setdefault("zero_force_ds_cpu_optimizer", False)
    ds.setdefault("steps_per_print", 10**9)  # progress and metrics are the trainer's
    ds.setdefault("wall_clock_breakdown", False)
    return ds


def _refuse_unsupported(ds: dict[str, Any], path: Path) -> None:
    zero = ds.get("zero_optimization")
    if not isinstance(zero, dict) or zero.get("stage") not in (1, 2, 3):
        raise UserError(f"deepspeed: {path}: zero_optimization.stage must be 1, 2 or 3")
    if zero.get("reduce_scatter", True) is not True:
        raise UserError(f"deepspeed: {path}: zero_optimization.reduce_scatter must be true")
    fp16 = ds.get("fp16", {})
    if fp16.get("enabled", False) not in (False, "auto"):
        raise UserError(f"deepspeed: {path}: fp16 is not supported; remove it and set model.precision to bf16 or fp32")
    ds.pop("fp16", None)
    for key, owner in (
        ("optimizer", "train.learning_rate, train.adam_beta1, ..."),
        ("scheduler", "train.warmup_steps, train.min_lr_ratio"),
        ("train_batch_size", "train.micro_batch_size and train.gradient_accumulation_steps"),
    ):
        if ds.get(key, "auto") != "auto":
            raise UserError(f"deepspeed: {path}: remove {key}; it is set by {owner}")
        ds.pop(key, None)
    for key in ("prescale_gradients", "gradient_predivide_factor"):
        if key in ds:
            raise UserError(f"deepspeed: {path}: remove {key}; the trainer owns the scale of gradients")


def zero_stage(ds: dict[str, Any]) -> int:
    """The ZeRO stage of a completed DeepSpeed configuration."""
    return int(ds["zero_optimization"]["stage"])


def inference_only(ds: dict[str, Any]) -> dict[str, Any]:
    """The same configuration for a frozen teacher's engine: no optimizer, nothing offloaded for one."""
    zero = {key: value for key, value in ds["zero_optimization"].items() if key != "offload_optimizer"}
    return {**ds, "zero_optimization": zero}
