"""Every key of a run's configuration, its default and its unit: one frozen, typed tree.

Each value has one owner, this tree; the DeepSpeed JSON is completed from it (`linearard.ds_config`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

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
