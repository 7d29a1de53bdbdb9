"""The configuration of a run: one frozen, typed tree, read from YAML and `key.subkey=value` overrides.

Each value has one owner, this tree; the DeepSpeed JSON is completed from it (`linearard.ds_config`).
Unknown keys, wrong types and combinations that cannot work raise `UserError` before anything starts.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from linearard.errors import UserError
from linearard.tree import apply_override, build

RELATIONS = ("qq", "kk", "vv", "qk")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on the projections (the paper's 7B runs: r 1024, alpha 2048, dropout 0.05)."""

    r: int = 1024
    alpha: float = 2048.0
    dropout: float = 0.05
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class ModelConfig:
    """The base model and what of it is trained."""

    path: str = ""  # folder, or name on the Hugging Face hub; weights, config and tokenizer
    revision: str | None = None
    tokenizer: str | None = None  # default: path
    rope_parameters: dict[str, Any] = field(default_factory=dict)  # the student's, with Hugging Face's own keys
    existing_rope: str = "refuse"  # refuse | compose: what to do with a base whose RoPE is scaled already
    trainable: str = "lora"  # lora | qkv | full
    lora: LoraConfig = LoraConfig()
    precision: str = "bf16"  # bf16 | fp32
    gradient_checkpointing: bool = True
    gradient_checkpointing_kwargs: dict[str, Any] = field(default_factory=lambda: {"use_reentrant": False})
    disable_sliding_window: bool = False  # drop the base's sliding window, in training and in the export


@dataclass(frozen=True)
class TeacherConfig:
    """The frozen teacher: same weights, native RoPE."""

    kind: str = "auto"  # auto | shared (the student's frozen weights, adapters off) | replica
    window: int | str = "native"  # native (max_position_embeddings of the base) | full | number of tokens
    # Its q, k, v until the student's backward pass uses them: auto (the first that fits, by linearard.plan) | keep
    # | recompute (from the attention's inputs) | offload (to host memory)
    tensors: str = "auto"


@dataclass(frozen=True)
class ObjectiveConfig:
    """The terms of the loss and their weights; a term of weight 0 is not computed.

    loss = sum_r w_r * mean KL of relation r  +  logits_kl * mean KL of the next-token distributions
         + next_token * mean next-token cross-entropy           (natural log, nats)
    """

    # Replaces these as a whole: a relation that is not named is off.
    relations: dict[str, float] = field(default_factory=lambda: {"qq": 1.0, "kk": 1.0, "vv": 1.0})
    logits_kl: float = 0.0
    next_token: float = 0.0
    layers: str | tuple[int, ...] = "all"  # all | last | list of layer numbers from 0


@dataclass(frozen=True)
class SourceConfig:
    """One source of documents; exactly one of path and name."""

    path: str | None = None  # file, folder or glob: text tree, .jsonl[.gz|.zst], .parquet
    name: str | None = None  # Hugging Face data set
    subset: str | None = None
    split: str = "train"
    format: str = "auto"  # auto | text | jsonl | parquet
    text_field: str = "text"
    include: tuple[str, ...] = ("*.txt", "*.md", "*.rst", "*.py")  # file names taken from a text tree
    exclude: tuple[str, ...] = ()  # patterns against the path relative to the tree
    max_documents: int | None = None
    role: str = "both"  # both (split by document) | train | held_out


@dataclass(frozen=True)
class DataConfig:
    """Documents, how they are tokenised, cached, split and packed."""

    sources: tuple[SourceConfig, ...] = ()
    seq_len: int = 4096  # tokens of one training sequence, over all ranks
    cache_dir: str = ".cache/linearard"
    held_out_fraction: float = 0.02  # of documents, chosen by a hash of the document's identity
    max_bad_records: int = 0  # skipped records or files allowed before the run refuses to go on
    shuffle: bool = True
    min_document_tokens: int = 2
    add_bos: bool = True
    add_eos: bool = False
    packing: str = "documents"  # documents (one segment each, positions restart) | stream (joined, one segment)
    num_proc: int = 1


@dataclass(frozen=True)
class ParallelConfig:
    """How one sequence is spread over ranks."""

    sequence_parallel_size: int = 1  # P, the Ulysses degree
    # auto (no communication where shards hold whole windows, else by the cost model, `relation_mode`) | heads
    # | sequence
    relation_parallel: str = "auto"


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation. AdamW; linear warm-up, then a cosine down to min_lr_ratio * learning_rate."""

    max_steps: int = 144
    micro_batch_size: int = 1  # sequences per data-parallel rank and micro-step
    gradient_accumulation_steps: int = 1
    learning_rate: float = 2e-5
    min_lr_ratio: float = 0.1
    warmup_steps: int = 4
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    gradient_clipping: float = 5.0  # 0: no clipping
    seed: int = 0
    save_every: int = 50  # optimizer steps; the last step is always saved
    keep_checkpoints: int = 2
    resume: bool = True  # go on from the newest checkpoint in run_dir/checkpoints; false: refuse to, if there is one


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out evaluation of the student inside training."""

    every: int = 0  # optimizer steps; 0: only after the last step
    multiples: tuple[int, ...] = (1,)  # window lengths, in multiples of the native length
    max_windows: int = 16  # per length
    enabled: bool = True


@dataclass(frozen=True)
class MetricsConfig:
    """What is measured and where it is written."""

    per_layer_every: int = 0  # optimizer steps between per-layer relation losses in metrics.jsonl; 0: never
    tensorboard: bool = True
    peak_tflops: float | None = None  # per GPU, for MFU; default: known GPUs' dense bf16 figure
    progress: bool = True


@dataclass(frozen=True)
class ClusterConfig:
    """What `--dry-run` plans for; null: the figures of `linearard.cluster.GPUS`. No step depends on it."""

    gpus: int | None = None  # default: those of this machine, or parallel.sequence_parallel_size where it has none
    gpus_per_node: int = 8
    gpu: str = "auto"  # auto (what is here, else H200) | H200 | H100 | A100 | B200
    memory_gib: float | None = None
    peak_tflops: float | None = None  # dense bf16, of the data sheet; the others are what kernels reach
    matmul_tflops: float | None = None
    attention_tflops: float | None = None
    relation_tflops: float | None = None
    memory_gb_s: float | None = None
    nvlink_gb_s: float | None = None  # per GPU and direction, as the next one
    network_gb_s: float | None = None


@dataclass(frozen=True)
class ProfileConfig:
    """A torch profiler trace of one step on rank 0, with the seconds of each part: run_dir/profile/."""

    step: int = 0  # number of the step, from 1 (the first ones compile); 0: off


@dataclass(frozen=True)
class Config:
    """A whole run."""

    run_dir: str = ""
    deepspeed: str = "ds_configs/zero3.json"  # completed by this config; a conflict is refused
    model: ModelConfig = ModelConfig()
    teacher: TeacherConfig = TeacherConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    data: DataConfig = DataConfig()
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    metrics: MetricsConfig = MetricsConfig()
    cluster: ClusterConfig = ClusterConfig()
    profile: ProfileConfig = ProfileConfig()


# ------------------------------------------------------------------------------------------------ reading


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Reads a YAML file, applies `key.subkey=value` overrides (values are YAML), checks and freezes it.

    Raises:
        UserError: file missing or unreadable, unknown key, wrong type, or a combination that cannot work.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"--config {path}: no such file; give the path of a YAML file such as launch/demo.yaml"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--config {path}: cannot be read as YAML: {reason}") from None
    if not isinstance(raw, dict):
        raise UserError(f"--config {path}: must hold a mapping of keys, found {type(raw).__name__}")
    for override in overrides:
        apply_override(raw, override)
    config = from_dict(raw)
    check(config)
    return config


def from_dict(raw: dict[str, Any]) -> Config:
    """Builds the typed tree from plain dictionaries; refuses unknown keys and wrong types."""
    return build(Config, raw, "")


def to_dict(config: Any) -> dict[str, Any]:
    """The tree as plain dictionaries and lists, in a form that YAML writes and `from_dict` reads back."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return value

    return plain(config)


def dump(config: Config) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


# ----------------------------------------------------------------------------------------------- checking


def _one_of(name: str, value: Any, allowed: typing.Iterable[Any]) -> None:
    allowed = list(allowed)
    if value not in allowed:
        raise UserError(f"{name}: {value!r} is not known; use one of {', '.join(map(str, allowed))}")


def _at_least(name: str, value: float, minimum: float) -> None:
    if not value >= minimum:
        raise UserError(f"{name}: {value} is too small; use {minimum} or more")


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
        if not 0 <= model.lora.dropout < 1:
            raise UserError(f"model.lora.dropout: {model.lora.dropout} is not in [0, 1)")
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
        if not 0 <= getattr(train, name) < 1:
            raise UserError(f"train.{name}: {getattr(train, name)} is not in [0, 1)")
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
    if not 0 <= data.held_out_fraction < 1:
        raise UserError(f"data.held_out_fraction: {data.held_out_fraction} is not in [0, 1)")
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


def teacher_window(config: Config, native_length: int) -> int:
    """Tokens of one teacher window: at most seq_len; `native` is the base's max_position_embeddings."""
    window = config.teacher.window
    if window == "full":
        return config.data.seq_len
    return min(native_length if window == "native" else int(window), config.data.seq_len)


def layers_of(config: Config, num_hidden_layers: int) -> tuple[int, ...]:
    """The layer numbers that take part in the relation loss."""
    layers = config.objective.layers
    if layers == "all":
        return tuple(range(num_hidden_layers))
    if layers == "last":
        return (num_hidden_layers - 1,)
    return tuple(int(layer) for layer in layers)
