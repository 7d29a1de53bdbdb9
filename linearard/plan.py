"""The plan of a run: memory of a GPU and seconds of a step, for `--dry-run` and for `teacher.tensors: auto`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from linearard import costs, ds_config, metrics
from linearard.cluster import Cluster, resolve
from linearard.config import Config, relations_of
from linearard.costs import Dimensions
from linearard.errors import UserError
from linearard.parallel import ParallelContext
from linearard.relation_mode import HEADS, WINDOWS, RelationMode

RESERVE_GIB, RESERVE_SHARE = 2.0, 0.05  # CUDA context, NCCL and workspaces; fragments, as a share of what is allocated
AUTO_SHARE = 0.9  # of the GPU's memory that `teacher.tensors: auto` may fill
TEACHER_TENSORS = ("keep", "recompute", "offload")  # fastest first


@dataclass(frozen=True)
class Plan:
    """What one GPU holds and what one optimizer step takes.

    Attributes:
        cluster: what it was computed for.
        memory: part -> GiB at the step's fullest moment; the sum is the allocator's peak.
        host_memory: part -> GiB of the host, for each rank.
        seconds: part -> seconds of an optimizer step; the sum is the step.
        tokens: of an optimizer step, over all ranks.
        flops: that a step needs, over all ranks (`metrics.step_flops`: nothing for recomputation).
        teacher_tensors: keep | recompute | offload.
        relation_mode: how the relations are spread over ranks.
    """

    cluster: Cluster
    memory: dict[str, float]
    host_memory: dict[str, float]
    seconds: dict[str, float]
    tokens: int
    flops: float
    teacher_tensors: str
    relation_mode: RelationMode

    @property
    def peak_gib(self) -> float:
        return sum(self.memory.values())

    @property
    def needed_gib(self) -> float:
        """The peak and what lies outside the allocator's count."""
        return self.peak_gib * (1 + RESERVE_SHARE) + RESERVE_GIB

    @property
    def fits(self) -> bool:
        return self.needed_gib <= self.cluster.gpu.memory_gib

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.tokens / self.step_seconds / self.cluster.gpus

    @property
    def mfu(self) -> float:
        return self.flops / self.step_seconds / self.cluster.gpus / (self.cluster.gpu.peak_tflops * 1e12)


def plan_run(
    config: Config, shape: Dimensions, ds: dict[str, Any], cluster: Cluster, teacher_tensors: str | None = None
) -> Plan:
    """The plan of a run.

    Args:
        config: checked against the model.
        shape: of the base (`costs.dimensions_of`).
        ds: the completed DeepSpeed configuration (`ds_config.complete`).
        cluster: `cluster.resolve`.
        teacher_tensors: keep | recompute | offload; default: the configuration's. `auto` is the first of these, which
            is the fastest, that fills at most 0.9 of the GPU's memory, else offload.
    """
    run = costs.Run(config, shape, ds, cluster)
    wanted = teacher_tensors or config.teacher.tensors
    if wanted != "auto":
        return _plan(run, wanted)
    plans = [_plan(run, each) for each in TEACHER_TENSORS[: 3 if run.relations else 1]]
    return next((plan for plan in plans if plan.needed_gib <= AUTO_SHARE * cluster.gpu.memory_gib), plans[-1])


def _plan(run: costs.Run, teacher_tensors: str) -> Plan:
    config, shape = run.config, run.shape
    student, of_teacher = run.passes()
    flops = metrics.step_flops(
        tokens=1,
        seq_len=config.data.seq_len,
        window=run.window,
        student=student,
        teacher=of_teacher if run.teacher else None,
        relation_layers=run.relation_layers,
        heads={n: shape.num_attention_heads if "q" in n else shape.num_key_value_heads for n in run.relations},
        num_attention_heads=shape.num_attention_heads,
        head_dim=shape.head_dim,
    )
    tokens = run.tokens * run.cluster.gpus * config.train.gradient_accumulation_steps
    memory, host = costs.memory(run, teacher_tensors)
    seconds = costs.seconds(run, teacher_tensors)
    return Plan(run.cluster, memory, host, seconds, tokens, flops * tokens, teacher_tensors, run.relation_mode)


def teacher_tensors(config: Config, native: Any, ds: dict[str, Any], context: ParallelContext) -> str:
    """`teacher.tensors` of a run that starts: keep, recompute or offload, the same on all ranks.

    Args:
        config: checked against the model.
        native: the base's transformers configuration.
        ds: the completed DeepSpeed configuration.
        context: this rank's place; `auto` on a CPU is keep.
    """
    if config.teacher.tensors != "auto":
        return config.teacher.tensors
    votes = torch.zeros(len(TEACHER_TENSORS), device=context.device)
    mine = "keep"
    if context.device.type == "cuda":
        mine = plan_run(config, costs.dimensions_of(native), ds, of_run(config, context)).teacher_tensors
    votes[TEACHER_TENSORS.index(mine)] = 1.0
    return TEACHER_TENSORS[int(context.all_reduce(votes).nonzero().max())]  # GPUs may differ a little


def relation_mode(config: Config, native: Any, context: ParallelContext) -> RelationMode:
    """How a run that starts spreads its relations over ranks, the same on all ranks.

    Args:
        config: checked against the model.
        native: the base's transformers configuration.
        context: this rank's place.
    """
    mine = costs.relation_mode_of(config, costs.dimensions_of(native), of_run(config, context))
    if config.parallel.relation_parallel != "auto" or context.sequence_parallel_size == 1 or mine.name == WINDOWS:
        return mine
    by_heads = context.all_reduce(torch.tensor(float(mine.name == HEADS), device=context.device))
    if by_heads and mine.name != HEADS:  # links that differ
        return RelationMode(HEADS, "as other ranks find it better")
    return mine


def of_run(config: Config, context: ParallelContext) -> Cluster:
    """The GPUs that a run has started on, whatever the configuration plans for."""
    here = dataclasses.replace(config.cluster, gpu="auto", memory_gib=None)
    return resolve(here, context.sequence_parallel_size, context.world_size)


@dataclass(frozen=True)
class ForDryRun:
    """What `--dry-run` says about a run."""

    config: Config
    shape: Dimensions
    ds: dict[str, Any]
    plan: Plan

    @classmethod
    def of(cls, config: Config, native: Any) -> ForDryRun:
        """The plan of a checked configuration for the cluster that it names.

        Raises:
            UserError: the section `cluster` names what does not exist.
        """
        shape, ds = costs.dimensions_of(native), ds_config.complete(config)
        on = resolve(config.cluster, config.parallel.sequence_parallel_size)
        return cls(config, shape, ds, plan_run(config, shape, ds, on))

    def table(self) -> str:
        """The plan, and the longest context that fits."""
        longest = f"longest data.seq_len that fits: {self.longest_context():,}"
        return f"{table(self.plan)}\n{longest}"

    def longest_context(self) -> int:
        """The largest data.seq_len that fits, in steps of 1,024 tokens a rank; 0 where none does."""
        step = 1024 * self.config.parallel.sequence_parallel_size

        def fits(steps: int) -> bool:
            return self._with("data", "seq_len", steps * step).fits

        low, high = 0, 1
        while high < 2**20 and fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low * step

    def refuse_what_cannot_fit(self) -> None:
        """Raises where the plan needs more than the GPU has.

        Raises:
            UserError: names the field, the largest part, and each change of one setting that helps.
        """
        if self.plan.fits:
            return
        cluster, remedies = self.plan.cluster, list(self._remedies())
        largest, size = max(self.plan.memory.items(), key=lambda item: item[1])
        if self.longest_context():
            remedies.append(f"data.seq_len={self.longest_context()}")
        if not remedies:
            remedies.append("nothing tried here; use more GPUs (cluster.gpus) or others (cluster.gpu)")
        raise UserError(
            f"data.seq_len: {self.config.data.seq_len:,} tokens on {cluster.gpus} {cluster.name} need "
            f"{self.plan.needed_gib:.1f} GiB a GPU, which has {cluster.gpu.memory_gib:.1f} (largest part: {largest}, "
            f"{size:.1f}); what would fit by the plan: {', or '.join(remedies)}"
        )

    def _with(self, section: str, key: str, value: Any, cluster: Cluster | None = None) -> Plan:
        changed = dataclasses.replace(getattr(self.config, section), **{key: value})
        config = dataclasses.replace(self.config, **{section: changed})
        return plan_run(config, self.shape, self.ds, cluster or self.plan.cluster)

    def _remedies(self) -> Iterator[str]:
        """Changes of one setting with which the run fits."""
        config, shape = self.config, self.shape
        if relations_of(config):
            modes = TEACHER_TENSORS[TEACHER_TENSORS.index(self.plan.teacher_tensors) + 1 :]
            yield from (f"teacher.tensors={mode}" for mode in modes if self._with("teacher", "tensors", mode).fits)
        if not config.model.gradient_checkpointing and self._with("model", "gradient_checkpointing", True).fits:
            yield "model.gradient_checkpointing=true"
        if config.train.micro_batch_size > 1 and self._with("train", "micro_batch_size", 1).fits:
            yield "train.micro_batch_size=1"
        heads, key_heads = shape.num_attention_heads, shape.num_key_value_heads
        size = 2 * config.parallel.sequence_parallel_size
        while (
            heads % size == 0 and config.data.seq_len % size == 0 and (key_heads % size == 0 or size % key_heads == 0)
        ):
            gpus = max(self.plan.cluster.gpus, size)
            cluster = dataclasses.replace(self.plan.cluster, gpus=gpus)
            if gpus % size == 0 and self._with("parallel", "sequence_parallel_size", size, cluster).fits:
                yield f"parallel.sequence_parallel_size={size} on {gpus} GPUs"
                break
            size *= 2
        zero = self.ds["zero_optimization"]
        if "offload_optimizer" not in zero:
            host = {"stage": 3, "offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
            ds = {**self.ds, "zero_optimization": {**zero, **host}}
            if plan_run(config, shape, ds, self.plan.cluster).fits:
                yield "deepspeed=ds_configs/zero3_offload.json"


def table(plan: Plan) -> str:
    """The plan in words and columns."""
    cluster, gpu = plan.cluster, plan.cluster.gpu
    lines = [f"Plan for {cluster.gpus} x {cluster.name} ({cluster.source}), {plan.tokens:,} tokens a step"]
    if not gpu.measured:
        lines.append(f"The figures of {cluster.name} are scaled from the H200's and were not measured.")
    lines += ["", *_columns("GiB a GPU", plan.memory, 2)]
    lines.append(_line("peak of the allocator", plan.peak_gib, 2))
    lines.append(_line(f"with reserve, of {gpu.memory_gib:.1f}", plan.needed_gib, 2))
    if plan.host_memory:
        lines += ["", *_columns("GiB of the host, each rank", plan.host_memory, 2)]
    lines += ["", *_columns("seconds a step", plan.seconds, 3), _line("step", plan.step_seconds, 3), ""]
    rate = plan.tokens_per_second_per_gpu
    lines.append(f"{rate:,.0f} tokens/s/GPU, MFU {plan.mfu:.3f}, teacher.tensors {plan.teacher_tensors}")
    if any(name.startswith("relation ") for name in plan.seconds):
        lines.append(f"relations: {plan.relation_mode.name} ({plan.relation_mode.why})")
    lines.append("A model with one document a sequence, not a measurement; shorter documents take less time.")
    return "\n".join(lines)


def _columns(title: str, parts: dict[str, float], digits: int) -> list[str]:
    total = sum(parts.values())
    return [title, *(f"{_line(name, value, digits)} {value / total:5.0%}" for name, value in parts.items())]


def _line(name: str, value: float, digits: int) -> str:
    return f"  {name:54}{value:9.{digits}f}"
