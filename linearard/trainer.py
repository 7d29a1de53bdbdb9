"""The run: data, engine, resume, the loop, evaluation, checkpoints."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PretrainedConfig

from linearard import checkpoint, costs, ds_config, evaluation, metrics, plan, profiling
from linearard import config as configuration
from linearard.capture import AttentionPass
from linearard.config import Config, ObjectiveConfig
from linearard.data import (
    BatchStream,
    Corpus,
    PackedDataset,
    evaluation_windows,
    load_tokenizer,
    prepare,
    tokenizer_fingerprint,
)
from linearard.engine import Engine, StepResult
from linearard.errors import UserError
from linearard.layout import whole_sequence
from linearard.logs import get_logger
from linearard.losses import per_layer_table
from linearard.parallel import ParallelContext

log = get_logger("trainer")


def run(config: Config, native: PretrainedConfig, context: ParallelContext) -> None:
    """Trains from the start or from the newest checkpoint to train.max_steps.

    Args:
        config: checked against the model.
        native: the base's configuration.
        context: this rank's place.

    Raises:
        UserError: unusable data, model or checkpoint.
    """
    run_dir = Path(config.run_dir)
    corpus = _prepare(config, context)
    dataset = PackedDataset(corpus.train, config.data.seq_len, config.data.packing, config.train.seed)
    stream = BatchStream(
        dataset,
        config.train.micro_batch_size,
        context.data_parallel_rank,
        context.data_parallel_size,
        config.train.seed,
        config.data.shuffle,
    )
    log.info(
        "%d training sequences of %d tokens, %.1f %% padding",
        len(dataset),
        config.data.seq_len,
        100 * dataset.padding_fraction,
    )
    base = context.main_first(lambda: _base_identity(config, run_dir, context.is_main))
    resume_from = checkpoint.newest(run_dir)
    if resume_from is not None and not config.train.resume:
        raise UserError(
            f"train.resume: false, but {resume_from} is there; use another run_dir, or move its checkpoints away"
        )
    if resume_from is not None:
        checkpoint.check_resumable(resume_from, config, context, base)
    elif context.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(configuration.dump(config))
    _warn_by_plan(config, native, context)
    engine = Engine(config, native, context)
    log.info("student and teacher frequencies differ by up to %.3g (relative)", engine.rope.largest_difference())
    step = 0
    if resume_from is not None:
        step, position = checkpoint.load(engine.engine, resume_from, context)
        stream.load_state_dict(position)
        log.info("going on from %s", resume_from)
    _loop(config, native, context, engine, stream, corpus, base, step)


def _warn_by_plan(config: Config, native: PretrainedConfig, context: ParallelContext) -> None:
    """On GPUs, says what the plan expects, and warns where it does not fit: a plan may err."""
    if context.device.type != "cuda" or not context.is_main:
        return
    ds, on = ds_config.complete(config), plan.of_run(config, context)
    planned = plan.plan_run(config, costs.dimensions_of(native), ds, on)
    expected = f"{planned.step_seconds:.1f} s a step, {planned.peak_gib:.1f} GiB at the peak"
    log.info("plan: %s, teacher.tensors %s", expected, planned.teacher_tensors)
    if not planned.fits:
        log.warning(
            "plan: %s, with reserve %.1f of %.1f GiB: the GPU may run out of memory; --dry-run says what would fit",
            expected, planned.needed_gib, planned.cluster.gpu.memory_gib,
        )  # fmt: skip


@contextlib.contextmanager
def _profile(config: Config, context: ParallelContext, step: int) -> Iterator[None]:
    """Profiles the step that the configuration names, on rank 0."""
    if not (context.is_main and step == config.profile.step):
        yield
        return
    folder = Path(config.run_dir) / "profile" / f"step-{step}"
    with profiling.traced(folder, context.device):
        yield
    log.info("profile of step %d in %s: %s", step, folder, profiling.in_words(profiling.read_summary(folder)))


def _prepare(config: Config, context: ParallelContext) -> Corpus:
    tokenizer_path = config.model.tokenizer or config.model.path

    def work() -> Corpus:
        tokenizer = load_tokenizer(tokenizer_path, None if config.model.tokenizer else config.model.revision)
        progress = context.is_main and config.metrics.progress
        return prepare(config.data, tokenizer, tokenizer_fingerprint(tokenizer), progress=progress)

    return context.main_first(work)


def _base_identity(config: Config, run_dir: Path, write: bool) -> dict[str, str]:
    """The base's hash; kept in run_dir/base.json for as long as the model's files stay as they are."""
    file = run_dir / "base.json"
    folder = Path(config.model.path)
    status = [(f.name, f.stat()) for f in sorted(folder.iterdir())] if folder.is_dir() else []
    stamp = [config.model.revision, *([name, s.st_size, s.st_mtime_ns] for name, s in status)]
    if file.exists():
        stored = json.loads(file.read_text())
        if stored["path"] == config.model.path and stored.get("stamp") == stamp:
            return {"path": stored["path"], "sha256": stored["sha256"]}
    identity = checkpoint.base_identity(config.model.path, config.model.revision)
    if write:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({**identity, "stamp": stamp}))
        except OSError as error:
            raise UserError(f"run_dir: {run_dir} cannot be written ({error}); name a folder that can") from None
    return identity


def _loop(
    config: Config,
    native: PretrainedConfig,
    context: ParallelContext,
    engine: Engine,
    stream: BatchStream,
    corpus: Corpus,
    base: dict[str, str],
    step: int,
) -> None:
    train = config.train
    writer = metrics.MetricsWriter(Path(config.run_dir), step, config.metrics.tensorboard) if context.is_main else None
    costs = _StepCosts(config, native, engine)
    quiet = not (context.is_main and config.metrics.progress)
    bar = tqdm(total=train.max_steps, initial=step, desc="train", unit="step", disable=quiet)
    tokens_seen = step_tokens = 0
    try:
        tokens_seen = _tokens_before(Path(config.run_dir), step) if context.is_main else 0
        timer = metrics.StepTimer(context.device)
        while step < train.max_steps:
            batches = [stream.next_batch() for _ in range(train.gradient_accumulation_steps)]
            largest = max(int(batch["input_ids"].max()) for batch in batches)
            if largest >= native.vocab_size:
                raise UserError(
                    f"model.tokenizer: token {largest} is beyond the model's vocabulary of {native.vocab_size}; "
                    "use the model's own tokenizer"
                )
            with _profile(config, context, step + 1):
                result = engine.step(batches, step)
            step += 1
            step_tokens = result.tokens
            tokens_seen += step_tokens
            if writer is not None:
                record = costs.record(step, result, tokens_seen, timer.lap(), context)
                writer.write(record)
                bar.set_postfix(
                    loss=f"{result.loss:.4f}",
                    norm=f"{result.grad_norm:.3g}",
                    tok_s_gpu=f"{record['tokens_per_second_per_gpu']:.0f}",
                )
                bar.update()
            last = step == train.max_steps
            if last or step % train.save_every == 0:
                checkpoint.save(engine.engine, config, context, step, stream.state_dict(), base)
            if config.evaluation.enabled and (
                last or (config.evaluation.every and step % config.evaluation.every == 0)
            ):
                scores = evaluate(config, native, context, engine, corpus)
                if writer is not None:
                    writer.write({"step": step, "evaluation": scores})
                    log.info("step %d: %s", step, json.dumps(scores))
            if last or step % train.save_every == 0 or config.evaluation.every:
                timer.lap()
    finally:
        bar.close()
        if writer is not None:
            writer.close()


def _tokens_before(run_dir: Path, step: int) -> int:
    """Tokens seen in the steps before, from metrics.jsonl."""
    file = run_dir / "metrics.jsonl"
    if not step or not file.exists():
        return 0
    seen = [json.loads(line).get("tokens_seen", 0) for line in file.read_text().splitlines()]
    return max(seen, default=0)


def _passes(objective: ObjectiveConfig, native: PretrainedConfig, engine: Engine) -> tuple[metrics.Pass, metrics.Pass]:
    """What student and teacher compute of the model's weights."""
    sizes, trained = {}, set()
    for name, parameter in engine.module.named_parameters():
        if getattr(native, "tie_word_embeddings", False):
            name = name.replace("embed_tokens", "lm_head")
        sizes[name] = int(getattr(parameter, "ds_numel", parameter.numel()))
        if parameter.requires_grad:
            trained.add(name)
    last = max(engine.relation_loss.layers)

    def computed(logits: float, left_out: str) -> metrics.Pass:
        needed = metrics.needed_weights(sizes, None if logits else last)
        needed = {name: size for name, size in needed.items() if not left_out or left_out not in name}
        of_trained = sum(size for name, size in needed.items() if name in trained)
        return metrics.Pass(sum(needed.values()), of_trained, native.num_hidden_layers if logits else last)

    return computed(objective.next_token or objective.logits_kl, ""), computed(objective.logits_kl, "lora_")


class _StepCosts:
    """Turns a step's result and its seconds into a record of metrics.jsonl."""

    def __init__(self, config: Config, native: PretrainedConfig, engine: Engine) -> None:
        self._config, self._layers = config, engine.relation_loss.layers
        self._peak = metrics.peak_tflops(engine.context.device, config.metrics.peak_tflops)
        heads = {
            name: native.num_attention_heads if "q" in name else native.num_key_value_heads for name in engine.weights
        }
        student, of_teacher = _passes(config.objective, native, engine)
        self._flops_of_token = metrics.step_flops(
            tokens=1,
            seq_len=config.data.seq_len,
            window=engine.window,
            student=student,
            teacher=of_teacher if engine.weights or config.objective.logits_kl else None,
            relation_layers=len(self._layers),
            heads=heads,
            num_attention_heads=native.num_attention_heads,
            head_dim=getattr(native, "head_dim", None) or native.hidden_size // native.num_attention_heads,
        )

    def record(
        self, step: int, result: StepResult, tokens_seen: int, seconds: float, context: ParallelContext
    ) -> dict[str, Any]:
        rate = result.tokens / seconds / context.world_size
        fields = asdict(result)
        del fields["relation_loss_per_layer"], fields["tokens"]
        record: dict[str, Any] = {"step": step, **fields}
        record["lr"] = record.pop("learning_rate")
        record |= {"tokens_seen": tokens_seen, "seconds": seconds, "tokens_per_second_per_gpu": rate}
        if self._peak is not None:
            record["mfu"] = rate * self._flops_of_token / (self._peak * 1e12)
        record["memory"] = metrics.memory_gib(context.device)
        every = self._config.metrics.per_layer_every
        if every and step % every == 0:
            record["relation_loss_per_layer"] = per_layer_table(self._layers, result.relation_loss_per_layer)
        return {key: value for key, value in record.items() if value is not None}


def evaluate(
    config: Config, native: PretrainedConfig, context: ParallelContext, engine: Engine, corpus: Corpus
) -> dict[str, Any]:
    """Scores the student on held-out windows of each length; windows are spread over ranks, each whole on one rank.

    Returns:
        {"1x": {"loss", "perplexity", "accuracy", "tokens", "loss_by_length"}, ...}; nats.
    """
    module, scores = engine.module, {}
    was_training = module.training
    module.eval()

    def forward(input_ids: torch.Tensor) -> torch.Tensor:
        ids, position_ids, segments = whole_sequence(input_ids, context.device)
        output = module(
            input_ids=ids, position_ids=position_ids, use_cache=False, attention_pass=AttentionPass(segments)
        )
        return output.logits

    try:
        for multiple in config.evaluation.multiples:
            length = native.max_position_embeddings * multiple
            windows = evaluation_windows(
                corpus.held_out, length, config.evaluation.max_windows, allow_short=multiple == 1
            )
            if not windows:
                log.warning("evaluation at %d tokens: no held-out document is that long; skipped", length)
                continue
            share = windows[context.rank :: context.world_size]
            rounds = -(-len(windows) // context.world_size)
            sums = evaluation.score(forward, share, length)
            for _ in range(rounds - len(share)):  # ZeRO-3 gathers weights on all ranks together
                with torch.no_grad():
                    forward(torch.zeros(1, length, dtype=torch.int64))
            table = torch.stack([sums.loss, sums.correct, sums.count]).to(context.device)
            sums = evaluation.PositionSums(*context.all_reduce(table).cpu())
            scores[f"{multiple}x"] = {
                "loss": sums.mean_loss,
                "perplexity": float(torch.tensor(sums.mean_loss).exp()),
                "accuracy": sums.accuracy,
                "tokens": int(sums.count.sum()),
                "loss_by_length": sums.by_multiple(native.max_position_embeddings),
            }
    finally:
        module.train(was_training)
    return scores


def check_run(config: Config, native: PretrainedConfig) -> None:
    """Every check that needs neither weights nor a device.

    Raises:
        UserError: names the field, its value and the remedy.
    """
    from linearard.models.rope import scaled_config
    from linearard.models.student import shape_of

    configuration.check_against_model(config, shape_of(native))
    ds_config.complete(config)
    scaled_config(native, config.model.rope_parameters, config.model.existing_rope)
    for i, source in enumerate(config.data.sources):
        if source.path is not None and not any(c in source.path for c in "*?[") and not Path(source.path).exists():
            raise UserError(f"data.sources.{i}.path: {source.path}: no such file or folder")
