"""What configurations are refused: values out of range and combinations that cannot work."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from linearard.config_keys import RELATIONS, ClusterConfig, Config, DataConfig, ObjectiveConfig
from linearard.errors import UserError


def _one_of(name: str, value: Any, allowed: Iterable[Any]) -> None:
    allowed = list(allowed)
    if value not in allowed:
        raise UserError(f"{name}: {value!r} is not known; use one of {', '.join(map(str, allowed))}")


def _at_least(name: str, value: float, minimum: float) -> None:
    if not value >= minimum:
        raise UserError(f"{name}: {value} is too small; use {minimum} or more")


def _share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise UserError(f"{name}: {value} is not in [0, 1)")


def check(config: Config) -> None:
    """Refuses what cannot work whatever the model is.

    Raises:
        UserError: names the field, its value and the remedy.
    """
    model, data, train, objective = config.model, config.data, config.train, config.objective
    if not config.run_dir:
        raise UserError("run_dir: missing; name the folder for checkpoints and metrics")
    if not model.path:
        raise UserError("model.path: missing; name a model folder or a Hugging Face model")
    _one_of("model.trainable", model.trainable, ("lora", "qkv", "full"))
    _one_of("model.precision", model.precision, ("bf16", "fp32"))
    _one_of("model.existing_rope", model.existing_rope, ("refuse", "compose"))
    if model.trainable == "lora":
        _at_least("model.lora.r", model.lora.r, 1)
        if not model.lora.alpha > 0:
            raise UserError(f"model.lora.alpha: {model.lora.alpha} must be above 0; adapters have no effect otherwise")
        _share("model.lora.dropout", model.lora.dropout)
        if not model.lora.target_modules:
            raise UserError("model.lora.target_modules: empty; name at least one projection, such as q_proj")
    if model.gradient_checkpointing and model.gradient_checkpointing_kwargs.get("use_reentrant", False) is not False:
        raise UserError(
            "model.gradient_checkpointing_kwargs.use_reentrant: reentrant checkpointing drops the relation gradient; "
            "set it to false"
        )
    _one_of("teacher.kind", config.teacher.kind, ("auto", "shared", "replica"))
    _one_of("teacher.tensors", config.teacher.tensors, ("auto", "keep", "recompute", "offload"))
    if config.teacher.kind == "shared" and model.trainable != "lora":
        raise UserError(
            f"teacher.kind: shared needs a frozen base, but model.trainable is {model.trainable}; use replica or auto"
        )
    _check_objective(objective)
    _check_window(config.teacher.window, data.seq_len)
    _check_data(data)
    _at_least("parallel.sequence_parallel_size", config.parallel.sequence_parallel_size, 1)
    _one_of("parallel.relation_parallel", config.parallel.relation_parallel, ("auto", "heads", "sequence"))
    if data.seq_len % config.parallel.sequence_parallel_size:
        raise UserError(
            f"data.seq_len: {data.seq_len} is not divisible by parallel.sequence_parallel_size "
            f"{config.parallel.sequence_parallel_size}; change one of them"
        )
    for name in ("max_steps", "micro_batch_size", "gradient_accumulation_steps", "save_every", "keep_checkpoints"):
        _at_least(f"train.{name}", getattr(train, name), 1)
    if not train.learning_rate > 0:
        raise UserError(f"train.learning_rate: {train.learning_rate} must be above 0")
    if not 0 <= train.min_lr_ratio <= 1:
        raise UserError(f"train.min_lr_ratio: {train.min_lr_ratio} is not in [0, 1]")
    for name in ("warmup_steps", "weight_decay", "gradient_clipping", "adam_eps", "seed"):
        _at_least(f"train.{name}", getattr(train, name), 0)
    for name in ("adam_beta1", "adam_beta2"):
        _share(f"train.{name}", getattr(train, name))
    if train.warmup_steps >= train.max_steps:
        raise UserError(
            f"train.warmup_steps: {train.warmup_steps} leaves no step of train.max_steps {train.max_steps} at the full "
            "learning rate; use fewer"
        )
    _at_least("evaluation.every", config.evaluation.every, 0)
    _at_least("evaluation.max_windows", config.evaluation.max_windows, 1)
    if any(multiple < 1 for multiple in config.evaluation.multiples):
        raise UserError("evaluation.multiples: use whole numbers from 1")
    _at_least("metrics.per_layer_every", config.metrics.per_layer_every, 0)
    peak = config.metrics.peak_tflops
    if peak is not None and not peak > 0:
        raise UserError(f"metrics.peak_tflops: {peak} must be above 0; leave it out for a known GPU")
    _check_cluster(config.cluster)
    _at_least("profile.step", config.profile.step, 0)


def _check_cluster(cluster: ClusterConfig) -> None:
    for name, value in dataclasses.asdict(cluster).items():
        if name in ("gpus", "gpus_per_node") and value is not None:
            _at_least(f"cluster.{name}", value, 1)
        elif isinstance(value, float) and not value > 0:
            raise UserError(f"cluster.{name}: {value} must be above 0; leave it out for a known GPU")


def _check_objective(objective: ObjectiveConfig) -> None:
    for name, weight in objective.relations.items():
        _one_of("objective.relations", name, RELATIONS)
        _at_least(f"objective.relations.{name}", weight, 0)
    _at_least("objective.logits_kl", objective.logits_kl, 0)
    _at_least("objective.next_token", objective.next_token, 0)
    if not any(objective.relations.values()) and not objective.logits_kl and not objective.next_token:
        raise UserError("objective: every term has weight 0; give at least one of relations, logits_kl, next_token")
    if isinstance(objective.layers, str):
        _one_of("objective.layers", objective.layers, ("all", "last"))
    elif not objective.layers or len(set(objective.layers)) != len(objective.layers) or min(objective.layers) < 0:
        raise UserError("objective.layers: give all, last, or different layer numbers from 0")


def _check_window(window: int | str, seq_len: int) -> None:
    if isinstance(window, str):
        _one_of("teacher.window", window, ("native", "full"))
    elif window > seq_len:
        raise UserError(
            f"teacher.window: {window} is longer than the context data.seq_len {seq_len}; "
            f"use native or at most {seq_len}"
        )
    else:
        _at_least("teacher.window", window, 1)


def _check_data(data: DataConfig) -> None:
    _at_least("data.seq_len", data.seq_len, 2)
    if not data.sources:
        raise UserError("data.sources: empty; list at least one {path: ...} or {name: ...}")
    for i, source in enumerate(data.sources):
        if (source.path is None) == (source.name is None):
            raise UserError(f"data.sources.{i}: give exactly one of path and name")
        _one_of(f"data.sources.{i}.format", source.format, ("auto", "text", "jsonl", "parquet"))
        _one_of(f"data.sources.{i}.role", source.role, ("both", "train", "held_out"))
        if source.max_documents is not None:
            _at_least(f"data.sources.{i}.max_documents", source.max_documents, 1)
    _one_of("data.packing", data.packing, ("documents", "stream"))
    _share("data.held_out_fraction", data.held_out_fraction)
    _at_least("data.max_bad_records", data.max_bad_records, 0)
    _at_least("data.num_proc", data.num_proc, 1)
    _at_least("data.min_document_tokens", data.min_document_tokens, 1)


@dataclass(frozen=True)
class ModelShape:
    """What of a model's configuration decides whether a run is possible."""

    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int  # of the base: the native window
    sliding_window: int | None


def check_against_model(config: Config, shape: ModelShape) -> None:
    """Refuses what cannot work with this model.

    Raises:
        UserError: names the field, its value and the remedy.
    """
    size = config.parallel.sequence_parallel_size
    heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
    if heads % size:
        raise UserError(
            f"parallel.sequence_parallel_size: {size} does not divide the model's {heads} attention heads; "
            f"use a divisor of {heads}"
        )
    if kv_heads % size and size % kv_heads:
        raise UserError(
            f"parallel.sequence_parallel_size: {size} and the model's {kv_heads} key-value heads do not divide each "
            f"other; use a divisor or a multiple of {kv_heads}"
        )
    layers = config.objective.layers
    if not isinstance(layers, str) and max(layers) >= shape.num_hidden_layers:
        raise UserError(
            f"objective.layers: layer {max(layers)} does not exist; "
            f"the model has layers 0 to {shape.num_hidden_layers - 1}"
        )
    window = shape.sliding_window
    longest = max(config.data.seq_len, shape.max_position_embeddings * max(config.evaluation.multiples, default=1))
    if window is not None and window < longest and not config.model.disable_sliding_window:
        raise UserError(
            f"model.disable_sliding_window: the base attends through a sliding window of {window} tokens, shorter than "
            f"{longest}; set it to true to train and export without the window, or use sequences of at most {window}"
        )
