"""What a step costs one GPU, part by part: GiB and seconds as functions of the run, the model's shape and the cluster.

Pure arithmetic, a model: one document fills each sequence (packed ones cost less attention), decoder layers are dense
ones as Llama's, all ranks work alike. `linearard.plan` puts the parts together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from linearard import metrics
from linearard.cluster import GIB, Cluster
from linearard.config import Config, layers_of, relations_of, teacher_window
from linearard.relation_mode import HEADS, WINDOWS, RelationMode, RelationShape, pick, waiting_seconds

# Constants that belong to no GPU. Bytes are per token and channel of a layer. Where they come from: two early runs of a
# 7B model on two H200, one pass at 32K tokens (2.86 s, 35.9 GiB) and the same model without relations (18.3 GiB; bound
# by the host at 1.38 s for 4K tokens). How they divide over forward, adapters and backward was counted. The steps in
# README.md were measured afterwards, and changed nothing here but NEVER_HIDDEN and how many layers stay gathered.
ELEMENTWISE = {"hidden": 170.0, "intermediate": 11.0, "lora": 50.0}  # moved by norms, RoPE, residuals, activations
BACKWARD_ELEMENTWISE = 2.25  # times forward
LOGITS_BYTES = 40.0  # moved per token and word of the vocabulary by a loss on logits, forward and backward
WORKING_SET = {"hidden": 40.0, "intermediate": 12.5}  # alive while a recomputed layer runs backward
RELATION_SET = 22.0  # per channel of q: an fp32 buffer, and gradients of q, k, v from relations and from attention
LOSS_CHUNK = 16.0 * 2**25  # bytes of `head_loss.CHUNK_LOGITS` logits, their softmax and gradients
HOST_SECONDS = 0.0108  # of ZeRO-3's hooks, per layer and pass: no pass is faster
QKV = ("q_proj", "k_proj", "v_proj")
HALF_RATE_TOKENS = {"attention": 800, "relation": 975}  # length of a segment at which half the rate is reached
# Of ZeRO-3 over several GPUs, over the time of its hooks: what of these and of the gathers nothing hides. From eight
# steps of 32K tokens on two and on four H200, which took 0.34 to 0.56 s longer than foretold without.
NEVER_HIDDEN = 0.37
OPTIMIZER_SECONDS = 0.015  # launches
HOST_LINK_GB_S = 50.0  # PCIe 5 x16 and pinned memory, per direction; not measured
HOST_MEMORY_GB_S = 100.0  # an optimizer step on the host, all ranks of a node; not measured


@dataclass(frozen=True)
class Dimensions:
    """A dense decoder's shape."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    native_length: int

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Linear layers of one decoder layer: name -> (inputs, outputs)."""
        hidden, wide = self.hidden_size, self.intermediate_size
        query, key = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return {
            "q_proj": (hidden, query), "k_proj": (hidden, key), "v_proj": (hidden, key), "o_proj": (query, hidden),
            "gate_proj": (hidden, wide), "up_proj": (hidden, wide), "down_proj": (wide, hidden),
        }  # fmt: skip

    def linear(self, *names: str) -> int:
        """Weights of these projections, or of all, in one layer."""
        return sum(a * b for name, (a, b) in self.projections.items() if not names or name in names)

    @property
    def head(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        layer = self.linear() + 2 * self.hidden_size
        return self.num_hidden_layers * layer + self.head * (1 if self.tied else 2) + self.hidden_size


def dimensions_of(native: Any) -> Dimensions:
    """The shape in a transformers configuration (`models.student.load_model_config`)."""
    heads = native.num_attention_heads
    return Dimensions(
        hidden_size=native.hidden_size,
        intermediate_size=getattr(native, "intermediate_size", None) or 4 * native.hidden_size,
        num_hidden_layers=native.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=native.num_key_value_heads,
        head_dim=getattr(native, "head_dim", None) or native.hidden_size // heads,
        vocab_size=native.vocab_size,
        tied=bool(getattr(native, "tie_word_embeddings", False)),
        native_length=native.max_position_embeddings,
    )


def relation_shape(config: Config, shape: Dimensions) -> RelationShape:
    """What the mode of a run's relations depends on."""
    return RelationShape(
        seq_len=config.data.seq_len,
        window=teacher_window(config, shape.native_length),
        sequence_parallel_size=config.parallel.sequence_parallel_size,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        micro_batch_size=config.train.micro_batch_size,
        element_size=2 if config.model.precision == "bf16" else 4,
    )


def relation_mode_of(config: Config, shape: Dimensions, cluster: Cluster) -> RelationMode:
    """How a run spreads its relations over ranks, `relation_mode.pick`."""
    of_relations = relation_shape(config, shape)
    tflops = _rate(cluster.gpu.relation_tflops, "relation", of_relations.window) / 1e12
    return pick(config.parallel.relation_parallel, of_relations, relations_of(config), cluster, tflops)


class Run:
    """The numbers that both models start from, of one rank and one micro-batch."""

    def __init__(self, config: Config, shape: Dimensions, ds: dict[str, Any], cluster: Cluster) -> None:
        """
        Args:
            config: checked against the model.
            shape: of the base.
            ds: the completed DeepSpeed configuration.
            cluster: resolved.
        """
        self.config, self.shape, self.cluster = config, shape, cluster
        self.zero: dict[str, Any] = ds["zero_optimization"]
        self.stage = int(self.zero["stage"])
        self.relation_shape = relation_shape(config, shape)
        self.size = self.relation_shape.sequence_parallel_size
        self.tokens = config.data.seq_len * config.train.micro_batch_size // self.size
        self.element, self.window = self.relation_shape.element_size, self.relation_shape.window
        self.relation_mode = relation_mode_of(config, shape, cluster)
        self.local_windows = self.relation_mode.name == WINDOWS
        objective = config.objective
        self.relations = relations_of(config)
        observed = layers_of(config, shape.num_hidden_layers)
        self.relation_layers = len(observed) if self.relations else 0
        self.teacher = bool(self.relations or objective.logits_kl)
        self.shared = config.teacher.kind == "shared" or (
            config.teacher.kind == "auto" and config.model.trainable == "lora"
        )
        self.lockstep = self.shared and bool(self.relations) and not objective.logits_kl  # `engine.Engine`
        self.logits = bool(objective.next_token or objective.logits_kl)
        # Behind the last layer's q, k, v nothing is computed that no term needs.
        self.student_layers = shape.num_hidden_layers if self.logits else max(observed)
        self.teacher_layers = shape.num_hidden_layers if objective.logits_kl else max(observed)
        self.lora = self.trainable if config.model.trainable == "lora" else 0
        # Of each key-value head where heads are divided over more ranks, which then divide its rows.
        self.replicas = self.relation_shape.replicas if self.relation_mode.name == HEADS else 1

    @property
    def trainable(self) -> int:
        """Weights that the optimizer moves, of the whole model."""
        model, shape = self.config.model, self.shape
        if model.trainable == "full":
            return shape.parameters
        if model.trainable == "qkv":
            return shape.num_hidden_layers * shape.linear(*QKV)
        adapted = [shape.projections[name] for name in model.lora.target_modules if name in shape.projections]
        return shape.num_hidden_layers * model.lora.r * sum(a + b for a, b in adapted)

    def passes(self) -> tuple[metrics.Pass, metrics.Pass]:
        """What student and teacher compute for each token."""
        shape, lora = self.shape, self.config.model.lora

        def adapters(*names: str) -> int:
            """LoRA's weights in one layer."""
            return lora.r * sum(sum(shape.projections[name]) for name in names if name in lora.target_modules)

        def weights(layers: int, logits: bool, of_layer: Callable[..., int], head: int) -> int:
            return layers * of_layer(*shape.projections) + (head if logits else of_layer(*QKV))

        base = weights(self.student_layers, self.logits, shape.linear, shape.head)
        added = weights(self.student_layers, self.logits, adapters, 0) if self.lora else 0
        projections = weights(self.student_layers, self.logits, lambda *_: shape.linear(*QKV), 0)
        trained = {"full": base, "qkv": projections, "lora": added}[self.config.model.trainable]
        whole = bool(self.config.objective.logits_kl)
        reference = weights(self.teacher_layers, whole, shape.linear, shape.head)
        return (
            metrics.Pass(base + added, trained, self.student_layers),
            metrics.Pass(reference, 0, self.teacher_layers),
        )

    def channels(self, letters: str) -> int:
        """Channels per token of these of a layer's q, k and v on this rank."""
        query = self.shape.num_attention_heads * self.shape.head_dim
        key = self.shape.num_key_value_heads * self.shape.head_dim * self.replicas
        return sum(query if letter == "q" else key for letter in sorted(set(letters)))

    def offloads(self, what: str) -> bool:
        """Whether DeepSpeed keeps `param` or `optimizer` on the host."""
        return (self.zero.get(f"offload_{what}") or {}).get("device", "none") != "none"


def memory(run: Run, teacher_tensors: str) -> tuple[dict[str, float], dict[str, float]]:
    """GiB of one rank by part, on the GPU and on the host.

    The GPU's parts are those of the fullest moment: backward of the last layers, the losses on logits before it, or the
    optimizer's step.
    """
    shape, gpus, tokens, element = run.shape, run.cluster.gpus, run.tokens, run.element
    partitions = gpus if run.stage == 3 else 1
    layers, hidden = shape.num_hidden_layers, shape.hidden_size
    copies = 1 if run.shared or not run.teacher else 2
    weights = shape.parameters * element * copies / partitions
    parts, host = {}, {}

    def put(name: str, amount: float, on_host: bool = False) -> None:
        if amount:
            (host if on_host else parts)[name] = amount

    put("weights of the base" if copies == 1 else "weights of student and teacher", weights, run.offloads("param"))
    put("adapters", run.lora * element / partitions, run.offloads("param"))
    put("gradients", run.trainable * element / (gpus if run.stage > 1 else 1), run.offloads("optimizer"))
    put("optimizer: fp32 weights and two moments", 12 * run.trainable / gpus, run.offloads("optimizer"))
    bucket = run.zero.get("reduce_bucket_size", 5e8)
    buckets = (1 if run.stage == 3 else 2) * (bucket if isinstance(bucket, int | float) else 5e8)
    if run.zero.get("contiguous_gradients", True):
        put("ZeRO's buffer of gradients", buckets * element)
    layer = (shape.linear() + run.lora / layers) * element
    if (run.stage == 3 and gpus > 1) or run.offloads("param"):
        most = float(run.zero.get("stage3_max_live_parameters", 1e9)) * element
        prefetch = float(run.zero.get("stage3_prefetch_bucket_size", 5e7)) * element
        # What is used again within this distance is not let go: the last layers, where forward turns into backward.
        again = float(run.zero.get("stage3_max_reuse_distance", 1e9)) * element
        put("gathered layers", min(max(2 * layer + prefetch, again), most, shape.parameters * element))
    resident = dict(parts)

    checkpoint = tokens * hidden * element
    put("checkpoints: inputs of the layers", layers * checkpoint if run.config.model.gradient_checkpointing else 0.0)
    letters = "".join(run.relations)
    kept = tokens * run.channels(letters) * element
    count = run.relation_layers
    if teacher_tensors == "keep":
        put("teacher: " + ", ".join(sorted(set(letters))), count * kept)
    elif teacher_tensors == "recompute":
        put("teacher: inputs of the layers", count * checkpoint + kept if count else 0.0)
    else:
        put("teacher: tensors on their way", min(2, count) * kept)
        put("teacher: tensors, pinned", count * kept, on_host=True)
    working = tokens * (WORKING_SET["hidden"] * hidden + WORKING_SET["intermediate"] * shape.intermediate_size)
    relations = tokens * (WORKING_SET["hidden"] * hidden + RELATION_SET * run.channels("q")) if count else 0.0
    scale = element / 2 * (1 if run.config.model.gradient_checkpointing else layers)
    loss = 2 * checkpoint + LOSS_CHUNK * (2 if run.config.objective.logits_kl else 1) if run.logits else 0.0
    fullest = {
        "one layer's backward" if scale <= 2 else "backward of all layers": working * scale,
        "one layer's backward with relations": relations * scale,
        "logits of a chunk of tokens": loss,
    }
    name = max(fullest, key=lambda key: fullest[key])
    put(name, fullest[name])
    if not run.offloads("optimizer"):
        # The fp32 gradient and two temporaries of one sub-group, when nothing else but the weights is there.
        group = min(run.trainable / gpus, float(run.zero.get("sub_group_size", 1e9)))
        if sum(resident.values()) + 12 * group > sum(parts.values()):
            parts = resident
            put("optimizer's step: fp32 gradients and temporaries", 12 * group)
    return {key: value / GIB for key, value in parts.items()}, {key: value / GIB for key, value in host.items()}


def seconds(run: Run, teacher_tensors: str) -> dict[str, float]:
    """Seconds of one optimizer step by part; their sum is the step.

    Communication of ZeRO runs beside the computation of its pass, as the host does: what is listed of them is what the
    pass waits for. The all-to-alls of Ulysses hide behind nothing.
    """
    config, shape, gpu, gpus = run.config, run.shape, run.cluster.gpu, run.cluster.gpus
    tokens, seq_len, layers, logits_kl = run.tokens, config.data.seq_len, run.student_layers, config.objective.logits_kl
    matrices, own = shape.linear(), 1 / shape.num_hidden_layers
    adapted = len(config.model.lora.target_modules) / 3 if run.lora else 0.0

    def products(weights: float) -> float:
        return 2.0 * tokens * weights / (gpu.matmul_tflops * 1e12)

    def attention(length: int) -> float:
        work = 2.0 * tokens * shape.num_attention_heads * shape.head_dim * length
        return work / _rate(gpu.attention_tflops, "attention", length)

    def elementwise(adapters: float) -> float:
        channels = ELEMENTWISE["hidden"] + adapters * ELEMENTWISE["lora"]
        moved = channels * shape.hidden_size + ELEMENTWISE["intermediate"] * shape.intermediate_size
        return tokens * moved * run.element / 2 / (gpu.memory_gb_s * 1e9)

    projections = products(shape.linear(*QKV))
    forward = layers * (products(matrices + run.lora * own) + attention(seq_len) + elementwise(adapted))
    again = forward if config.model.gradient_checkpointing else 0.0
    backward = products(matrices + (run.lora + run.trainable) * own) + 2.5 * attention(seq_len)
    backward = layers * (backward + BACKWARD_ELEMENTWISE * elementwise(adapted))
    teacher = run.teacher_layers * (products(matrices) + attention(run.window) + elementwise(0))
    # Of the layer at which a pass ends only the projections are computed.
    forward += 0.0 if run.logits else projections
    backward += 0.0 if run.logits else 2 * projections
    teacher = teacher + (0.0 if logits_kl else projections) if run.teacher else 0.0
    head = 0.0
    if run.logits:  # forward and the gradient of hidden states at once
        head = (2 + (1 if logits_kl else 0)) * products(shape.head)
        head += LOGITS_BYTES * tokens * shape.vocab_size / (gpu.memory_gb_s * 1e9)
    parts = {"teacher": teacher, "student forward": forward, "losses on logits": head}
    parts |= {"recomputation": again, "backward": backward}
    if run.relations and teacher_tensors == "recompute":
        letters = {f"{letter}_proj" for letter in "".join(run.relations)}
        once = products(shape.linear(*letters)) + 0.25 * elementwise(0)
        parts["teacher's q, k, v again"] = run.relation_layers * once
    relation_seconds = relations(run)
    for name, value in relation_seconds.items():
        parts[f"relation {name} in windows of {run.window:,}"] = value
    parts["Ulysses all-to-alls"] = _all_to_alls(run)

    # Each pass waits for the slowest of the GPU, the gathers of ZeRO-3, and the host.
    wide = run.cluster.link_gb_s(gpus) * 1e9
    gather = layers * matrices * run.element * (gpus - 1) / gpus / wide if run.stage == 3 else 0.0
    reduce = run.trainable * run.element * (gpus - 1) / gpus / wide
    hooks = layers * HOST_SECONDS if run.stage == 3 else 0.0
    backward_compute = again + backward + sum(relation_seconds.values())
    passes = [(backward_compute, gather + reduce, 2 * hooks)]
    if run.lockstep:  # a layer is gathered once for the teacher's forward and the student's
        passes += [(teacher + forward, gather, 2 * hooks)]
    else:
        passes += [(forward, gather, hooks), *([(teacher, gather, hooks)] if run.teacher else [])]
    parts["ZeRO's communication, not hidden"] = sum(max(0.0, moved - compute) for compute, moved, _ in passes)
    if gpus > 1:
        parts["ZeRO's gathers and hooks, never hidden"] = NEVER_HIDDEN * sum(host for *_, host in passes)
    parts["host, not hidden"] = sum(max(0.0, host - max(compute, moved)) for compute, moved, host in passes)
    if teacher_tensors == "offload" and run.relations:
        moved = run.relation_layers * tokens * run.channels("".join(run.relations)) * run.element
        once = moved / (HOST_LINK_GB_S * 1e9)
        parts["teacher's tensors to the host and back, not hidden"] = sum(
            max(0.0, once - compute) for compute in (teacher + (forward if run.lockstep else 0.0), backward_compute)
        )
    if run.offloads("param"):
        moved = layers * matrices * run.element / gpus / (HOST_LINK_GB_S * 1e9)
        parts["weights from the host, not hidden"] = sum(max(0.0, moved - compute) for compute, _, _ in passes)
    steps = config.train.gradient_accumulation_steps
    parts = {name: value * steps for name, value in parts.items()}
    rate = HOST_MEMORY_GB_S / run.cluster.gpus_per_node if run.offloads("optimizer") else gpu.memory_gb_s
    parts["optimizer"] = OPTIMIZER_SECONDS + 40 * run.trainable / gpus / (rate * 1e9)
    return {name: value for name, value in parts.items() if value}


def relations(run: Run) -> dict[str, float]:
    """Seconds of each relation, forward and backward, of one micro-batch: 6 half products over the windows.

    `relation_kl.cost_model` adds what of the exchanges cannot be hidden.
    """
    found, rate = {}, _rate(run.cluster.gpu.relation_tflops, "relation", run.window)
    for name in run.relations:
        channels = run.channels("q") if "q" in name else run.channels("k") / run.replicas
        seconds = 6.0 * run.tokens * channels * run.window / rate
        seconds += waiting_seconds(run.relation_mode.name, run.relation_shape, name, run.cluster, rate / 1e12)
        found[name] = run.relation_layers * seconds
    return found


def _rate(tflops: float, kind: str, length: int) -> float:
    """Operations a second over segments of this length."""
    return tflops * 1e12 * length / (length + HALF_RATE_TOKENS[kind])


def _all_to_alls(run: Run) -> float:
    """Seconds of exchanging q, k, v and the output of each layer, in each pass that attends across ranks."""
    if run.size == 1:
        return 0.0
    shape = run.shape
    key_heads = shape.num_key_value_heads * run.relation_shape.replicas
    channels = 2 * shape.head_dim * (shape.num_attention_heads + key_heads)
    passes = 2 + (1 if run.config.model.gradient_checkpointing else 0) + (run.teacher and not run.local_windows)
    moved = passes * shape.num_hidden_layers * run.tokens * channels * run.element * (run.size - 1) / run.size
    return moved / (run.cluster.link_gb_s(run.size) * 1e9)
