"""Student and teacher under DeepSpeed: building the engines, and one optimizer step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import deepspeed
import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from linearard import ds_config as ds
from linearard import parallel, plan, profiling, schedule
from linearard.capture import AttentionPass, attention_core, ending_at
from linearard.config import Config, layers_of, teacher_window
from linearard.errors import UserError
from linearard.head_loss import Logits, TokenTerms, chunk_tokens, token_loss, token_loss_of_adapted_head
from linearard.layout import MicroBatch, cut
from linearard.logs import get_logger
from linearard.losses import RelationLoss
from linearard.models.decoder import Decoder, Forwards, replaced_forwards
from linearard.models.rope import RopeSwitch, scaled_config
from linearard.models.student import load_model, make_trainable
from linearard.models.teacher import Teacher
from linearard.parallel import ParallelContext
from linearard.relation_mode import HEADS, SEQUENCE, WINDOWS
from linearard.teacher_tensors import OffloadedTensors, RecomputedTensors, TeacherTensors

log = get_logger("engine")

Loader = Callable[[Config, PretrainedConfig], nn.Module]


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step measured, reduced over all ranks and accumulation steps; means in nats."""

    loss: float
    relation_loss: dict[str, float]
    relation_loss_per_layer: dict[str, list[float]]
    next_token_loss: float | None
    logits_kl: float | None
    grad_norm: float  # before clipping
    learning_rate: float
    tokens: int  # not padding, over all ranks


class Engine:
    """The student's DeepSpeed engine with its teacher."""

    def __init__(
        self, config: Config, native: PretrainedConfig, context: ParallelContext, loader: Loader = load_model
    ) -> None:
        """Loads both models and starts ZeRO.

        Args:
            config: the run.
            native: the base's configuration (`models.student.load_model_config`).
            context: this rank's place.
            loader: gives the frozen base under a configuration; called under a live `HfDeepSpeedConfig` at stage 3.

        Raises:
            UserError: the model cannot be loaded or does not fit the configuration.
        """
        self.config, self.context, self._loader = config, context, loader
        self.window = teacher_window(config, native.max_position_embeddings)
        mode = plan.relation_mode(config, native, context)
        self.local_windows = mode.name == WINDOWS
        self.relation_group = parallel.relation_group(context) if mode.name == SEQUENCE else None
        self._ds_config = ds.complete(config)
        self.scaled = scaled_config(native, config.model.rope_parameters, config.model.existing_rope)
        self._hf_configs: list[HfDeepSpeedConfig] = []  # transformers keeps only weak references
        # Every rank initialises the adapters alike; dropout differs by rank afterwards.
        torch.manual_seed(config.train.seed)
        student = make_trainable(self._load(self.scaled, self._ds_config), config)
        self._decoder = self._parts(student)
        self.rope = RopeSwitch(student, native, self.scaled, config.data.seq_len, context.device)
        self.engine = self._initialize(student)
        torch.manual_seed(config.train.seed + 1 + context.rank)
        self._ulysses = parallel.ulysses(attention_core, native, config.train.micro_batch_size, context)
        self._teacher = self._build_teacher(native)
        self.weights = {name: weight for name, weight in config.objective.relations.items() if weight}
        if self.weights and context.sequence_parallel_size > 1:
            log.info("relations: mode %s: %s", mode.name, mode.why)
        # Ulysses gives each key-value head to so many neighbouring ranks, and adds up their gradients.
        replicas = max(context.sequence_parallel_size // native.num_key_value_heads, 1) if mode.name == HEADS else 1
        self.relation_loss = RelationLoss(
            self.weights,
            layers_of(config, native.num_hidden_layers),
            native.num_attention_heads,
            native.num_key_value_heads,
            (context.sequence_parallel_rank % replicas, replicas) if replicas > 1 else None,
            group=self.relation_group,
        )
        self._last_layer = max(self.relation_loss.layers)
        # Logits KL takes the teacher's last hidden states into the student's pass: the teacher's then comes before it.
        in_layers_alone = bool(self.weights) and not config.objective.logits_kl
        self._lockstep = in_layers_alone and self._teacher.can_lead(self._last_layer)
        self._tensors = self._teacher_tensors(native)

    @property
    def module(self) -> nn.Module:
        """The student: a transformers model, inside a PeftModel where LoRA is trained."""
        return self.engine.module

    @property
    def gradient_scale(self) -> float:
        """What a rank's share of the summed loss is multiplied with so that gradients are those of the sum.

        ZeRO 3 (reduce_scatter) averages over all ranks, ZeRO 1 and 2 divide by the number of data-parallel
        replicas only (deepspeed.runtime.zero: stage3, stage_1_and_2).
        """
        size = self.context.world_size
        return size if ds.zero_stage(self._ds_config) == 3 else size / self.context.sequence_parallel_size

    def step(self, batches: list[dict[str, torch.Tensor]], step: int) -> StepResult:
        """One optimizer step over one batch per accumulation step.

        Args:
            batches: host batches [B, T] (`linearard.layout.cut`), equal on the ranks of a sequence-parallel group.
            step: number of the optimizer step, from 0.

        Raises:
            FloatingPointError: loss or gradient norm is not finite; weights are left as they were.
        """
        config, device = self.config, self.context.device
        over_group = self.relation_group is not None
        cuts = [cut(batch, self.window, self.local_windows, over_group, self.context) for batch in batches]
        rate = self._set_learning_rate(step)
        counts = torch.tensor(
            [sum(c.relation_rows for c in cuts), sum(c.label_count for c in cuts)], dtype=torch.int64, device=device
        )
        rows, labels = (int(n) for n in self.context.all_reduce(counts).tolist())
        self.relation_loss.reset()
        sums = torch.zeros(2, dtype=torch.float64, device=device)  # next-token, logits KL
        for micro_batch in cuts:
            sums += self._micro_step(micro_batch, rows, labels)
            if micro_batch is not cuts[-1]:
                self.engine.step()  # counts the micro-step; nothing moves before the boundary
        relation_sums = self.relation_loss.stacked_sums(device)
        reduced = self.context.all_reduce(torch.cat([relation_sums.flatten(), sums]))
        means, per_layer = self.relation_loss.means(reduced[:-2].view_as(relation_sums), rows)
        next_token, kl = (reduced[-2:] / max(labels, 1)).tolist()
        loss = sum(weight * means[name] for name, weight in self.weights.items())
        loss += config.objective.next_token * next_token + config.objective.logits_kl * kl
        if not math.isfinite(loss):
            raise FloatingPointError(f"loss is {loss} at step {step}; weights are as they were before it")
        with profiling.part("optimizer"):
            self.engine.step()
        grad_norm = float(self.engine.get_global_grad_norm() or 0.0)
        if not math.isfinite(grad_norm):  # DeepSpeed leaves such a step out
            raise FloatingPointError(f"gradient norm is {grad_norm} at step {step}; weights are as they were before it")
        return StepResult(
            loss=loss,
            relation_loss=means,
            relation_loss_per_layer=per_layer,
            next_token_loss=next_token if config.objective.next_token else None,
            logits_kl=kl if config.objective.logits_kl else None,
            grad_norm=grad_norm,
            learning_rate=rate,
            tokens=rows,
        )

    def _micro_step(self, batch: MicroBatch, rows: int, labels: int) -> torch.Tensor:
        """Forward of teacher and student, backward; returns this rank's [next-token, logits KL] sums."""
        leading: Forwards = {}
        hidden = None
        if self._lockstep:
            leading = self._teacher.leading(batch, self._tensors, self._last_layer)
        else:
            with profiling.part("teacher"):
                hidden = self._teacher_forward(batch)
        terms = self._terms(batch, hidden, max(labels, 1))
        del hidden
        observer = self.relation_loss.observer(self._tensors, batch.relation_segment_ids, rows, self.gradient_scale)
        forwards: Forwards = {} if terms else self._decoder.nothing_behind(self._last_layer)
        if forwards:
            observer = ending_at(observer, self._last_layer)
        with replaced_forwards(forwards):  # in backward, too: checkpointing computes layers again there
            until_hidden = self._decoder.until_hidden(partial(self._token_loss, terms))
            with replaced_forwards({**until_hidden, **leading}), profiling.part("student forward"):
                loss, sums = self.engine(
                    input_ids=batch.input_ids,
                    position_ids=batch.position_ids,
                    use_cache=False,
                    attention_pass=AttentionPass(batch.segments, self._ulysses, observer, batch.observe_shards),
                )
            del terms, until_hidden, leading  # the teacher's hidden states
            self._tensors.prefetch()
            with profiling.part("backward"):
                self.engine.backward(loss * self.gradient_scale, scale_wrt_gas=False)
        assert not self._tensors.held, f"teacher tensors of layers {self._tensors.held} were not used"
        return sums

    def _teacher_forward(self, batch: MicroBatch) -> torch.Tensor | None:
        """Fills the teacher's tensors; returns its last hidden states [B, N, E] if a term needs them."""
        if self.config.objective.logits_kl:
            return self._teacher.forward(batch, self._tensors, None)
        return self._teacher.forward(batch, self._tensors, self._last_layer) if self.weights else None

    def _terms(self, batch: MicroBatch, teacher_hidden: torch.Tensor | None, labels: int) -> TokenTerms | None:
        objective, chunk = self.config.objective, chunk_tokens(self.scaled.vocab_size)
        if not objective.next_token and not objective.logits_kl:
            return None
        return TokenTerms(
            batch.labels, objective.next_token / labels, objective.logits_kl / labels, teacher_hidden, chunk
        )

    def _token_loss(self, terms: TokenTerms | None, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss [], [next-token, logits KL] sums) of the student's last hidden states [B, N, E]."""
        if terms is None:
            # Exactly 0. The output takes part all the same: ZeRO-3's hooks start there (relation gradients are added
            # inside the layers, `losses.RelationLoss`).
            return hidden[:, :0].sum(dtype=torch.float32), hidden.new_zeros(2, dtype=torch.float64)
        head = self._decoder.head
        own = [p for p in head.parameters(recurse=False) if p.requires_grad]
        adapted = len(own) < sum(p.requires_grad for p in head.parameters())

        def run(logits: Logits, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            if adapted:
                return token_loss_of_adapted_head(hidden, logits, terms, self._teacher.logits)
            if terms.teacher_hidden is None:
                return token_loss(hidden, logits, own, terms, None)
            return self._teacher.inside_head(lambda theirs: token_loss(hidden, logits, own, terms, theirs))

        return self._decoder.inside_head(run, hidden)

    # ------------------------------------------------------------------------------------------ building

    def _parts(self, model: nn.Module) -> Decoder:
        decoder, objective = Decoder.of(model), self.config.objective
        if decoder.logits_factor is None and (objective.next_token or objective.logits_kl):
            raise UserError(
                "model.path: the model's logits are not its lm_head's output times a constant (capped?); set "
                "objective.next_token and objective.logits_kl to 0, or use another model"
            )
        return decoder

    def _load(self, model_config: PretrainedConfig, ds_config: dict[str, Any]) -> nn.Module:
        """Loads weights: partitioned at once under ZeRO-3, whole otherwise."""
        if ds.zero_stage(ds_config) == 3:
            self._hf_configs.append(HfDeepSpeedConfig(copy.deepcopy(ds_config)))
        else:
            unset_hf_deepspeed_config()
        return self._loader(self.config, model_config)

    def _initialize(self, student: nn.Module) -> Any:
        train = self.config.train
        trainable = [p for p in student.parameters() if p.requires_grad]
        decay = [p for p in trainable if _shape(p).numel() and len(_shape(p)) > 1]
        plain = [p for p in trainable if not len(_shape(p)) > 1]
        groups = [{"params": decay, "weight_decay": train.weight_decay}]
        if plain:
            groups.append({"params": plain, "weight_decay": 0.0})
        optimizer = torch.optim.AdamW(
            groups, lr=train.learning_rate, betas=(train.adam_beta1, train.adam_beta2), eps=train.adam_eps
        )
        engine, *_ = deepspeed.initialize(
            model=student,
            optimizer=optimizer,
            config=copy.deepcopy(self._ds_config),
            mpu=parallel.mpu(self.context),
            dist_init_required=False,
        )
        return engine

    def _build_teacher(self, native: PretrainedConfig) -> Teacher:
        kind = self.config.teacher.kind
        if kind == "auto":
            kind = "shared" if self.config.model.trainable == "lora" else "replica"
        objective = self.config.objective
        needed = objective.logits_kl or any(objective.relations.values())
        if kind == "shared" or not needed:
            return Teacher(self._decoder.body, self._decoder, self._ulysses, self.rope)
        ds_config = ds.inference_only(self._ds_config)
        module = self._load(native, ds_config)
        decoder = self._parts(module)
        # The native frequencies, in fp32 and out of reach of casts, as the shared teacher has them.
        RopeSwitch(module, native, self.scaled, self.config.data.seq_len, self.context.device).make_native()
        if ds.zero_stage(ds_config) == 3:
            engine, *_ = deepspeed.initialize(
                model=module, config=copy.deepcopy(ds_config), mpu=parallel.mpu(self.context), dist_init_required=False
            )
            inference: Any = engine
            return Teacher(inference.module, decoder, self._ulysses, None)
        return Teacher(module.to(self.context.device), decoder, self._ulysses, None)

    def _teacher_tensors(self, native: PretrainedConfig) -> TeacherTensors:
        kind = plan.teacher_tensors(self.config, native, self._ds_config, self.context)
        layers = self.relation_loss.layers
        if kind == "offload":
            return OffloadedTensors(self.weights, layers, self.context.device)
        if kind == "keep" or not self.weights:
            return TeacherTensors(self.weights, layers)
        if any(self._teacher.decoder.attention(layer) is None for layer in layers):
            if self.config.teacher.tensors == "auto":
                return TeacherTensors(self.weights, layers)
            raise UserError(
                "teacher.tensors: recompute needs decoder layers with a module self_attn, which this model does not "
                "have; use keep or offload"
            )
        return RecomputedTensors(self.weights, layers, self._teacher.acting)

    def _set_learning_rate(self, step: int) -> float:
        train = self.config.train
        rate = schedule.learning_rate(
            step,
            peak=train.learning_rate,
            warmup_steps=train.warmup_steps,
            max_steps=train.max_steps,
            min_lr_ratio=train.min_lr_ratio,
        )
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        return rate


def _shape(parameter: Any) -> torch.Size:
    """A parameter's whole shape, also where ZeRO-3 has partitioned it."""
    return getattr(parameter, "ds_shape", parameter.shape)
