"""Measures whole training steps: the real engine, random weights, synthetic tokens; speed, memory, and the plan beside.

    deepspeed --num_gpus 2 tools/benchmark_training.py --cases issue --csv steps.csv
    deepspeed --num_gpus 1 tools/benchmark_training.py --cases stage1 --sequence-parallel-size 1
    python tools/benchmark_training.py --model tiny --lengths 64 --lora-rank 4      # one process, also on a CPU

A case is TERMS@WINDOW: terms joined by + from qq, kk, vv, qk and next (next-token loss), the teacher's window in tokens
or `full`. `next` alone is continued pre-training, without a teacher. `issue` stands for continued pre-training,
qq+kk+vv on windows of 4096 and on the whole sequence, and one pass (windowed relations and next token) at 32,768
tokens; `stage1` for 4,096-token sequences, 4 and 8 of them a step and rank. Every case runs at every length and
micro-batch size.

A new engine is built for each case (`--model` llama2-7b and the like: random weights, made on the ranks; a folder: its
weights). After the warm-up, each step lies between two synchronisations of all GPUs. Shown are the median and
(fastest..slowest) seconds, tokens/s/GPU, MFU as the trainer reports it, the allocator's peak on the fullest rank, the
ratio to continued pre-training at the same length and micro-batch in this run, and what `linearard.plan` foretells,
with its relative error. A case without memory says so and the others go on; with several ranks only if all of them
ran out alike: otherwise they wait for one another, and the run ends with what it has.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import os
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from benchmark_cases import MODELS, Case, case_name, cases_of, configure, folder_name, native_config
from deepspeed.runtime.zero import parameter_offload
from measuring import Parser, conditions, list_of, positive, whole
from transformers import AutoModelForCausalLM, PretrainedConfig

from linearard import cluster, costs, ds_config, logs, metrics, parallel, plan, profiling
from linearard.capture import ATTENTION
from linearard.config import Config
from linearard.engine import Engine
from linearard.errors import UserError
from linearard.models.student import DTYPES, load_model
from linearard.parallel import ParallelContext

COLUMNS = (
    *("case", "window", "seq_len", "micro_batch_size", "sequence_parallel_size", "world_size", "status"),
    *("seconds", "fastest", "slowest", "steps", "tokens_per_second_per_gpu", "mfu", "over_next", "loss"),
    *("peak_gib", "reserved_gib", "left_gib", "build_seconds", "first_step_seconds"),
    *("planned_seconds", "seconds_error", "planned_gib", "gib_error", "planned_needed_gib"),
    *("model", "lora_rank", "teacher_tensors", "deepspeed_config", "overrides"),
    *("gpu", "driver", "torch", "triton", "transformers", "deepspeed", "commit"),
)
WAIT = timedelta(seconds=60)
LAYOUT = "{:22} {:>8} {:>6}  {:>22} {:>9} {:>6} {:>7} {:>8}  {:>8} {:>7} {:>8} {:>7}"
TITLES = ("case", "tokens", "batch", "seconds", "tok/s/GPU", "MFU", "/ next", "peak GiB")
TITLES += ("plan s", "error", "plan GiB", "error")


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        options = parse(arguments)
        context = parallel.initialize(options.sequence_parallel_size or int(os.environ.get("WORLD_SIZE", "1")))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    logs.configure()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers and DeepSpeed, at every engine
    stuck = False
    try:
        stuck = measure_all(options, context)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        sys.stdout.flush()
        if not stuck:
            parallel.finalize()
    if stuck:
        os._exit(3)  # a collective never ends, and neither would the interpreter
    return 0


def measure_all(options: argparse.Namespace, context: ParallelContext) -> bool:
    """Runs the cases and reports on rank 0; returns whether the ranks have lost one another."""
    started, native = time.perf_counter(), native_config(options.model)
    # To agree without the GPUs, whose queues may never run dry after one rank ran out of memory.
    hosts: Any = dist.new_group(backend="gloo")
    fixed = _conditions(options, context)
    if context.is_main:
        print("{gpu}, driver {driver}, torch {torch}, DeepSpeed {deepspeed}, commit {commit}".format(**fixed))
        print(f"{context.world_size} ranks, P {_size(context)}, {options.model}, LoRA r {options.lora_rank}")
        print(f"{options.steps} steps after {options.warmup}\n\n{LAYOUT.format(*TITLES)}", flush=True)
    continued: dict[tuple[int, int], float] = {}
    longest, lost = 0.0, False
    with open((options.csv if context.is_main else None) or os.devnull, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for case in options.list:
            begin = time.perf_counter()
            row: dict[str, Any] = {**fixed, **case._asdict(), "case": case.name, "status": "not run: ranks are lost"}
            del row["terms"]
            if not lost:
                enough = [begin - started + longest < options.limit_seconds]
                dist.broadcast_object_list(enough, src=0, group=hosts)
                row["status"] = "not run: --limit-seconds"
                if enough[0]:
                    lost = _run_case(case, row, native, options, context, hosts)
            longest = max(longest, time.perf_counter() - begin)
            if row["status"] == "ok":
                key = case.seq_len, case.micro_batch_size
                if case.name == "next":
                    continued[key] = row["seconds"]
                row["over_next"] = row["seconds"] / continued[key] if key in continued else None
                row["seconds_error"] = row["planned_seconds"] / row["seconds"] - 1
                row["gib_error"] = row["planned_gib"] / row["peak_gib"] - 1 if "peak_gib" in row else None
            if context.is_main:
                print(_line(row), flush=True)
                writer.writerow(row)
                file.flush()
    return lost


def _run_case(
    case: Case,
    row: dict[str, Any],
    native: PretrainedConfig,
    options: argparse.Namespace,
    context: ParallelContext,
    hosts: Any,
) -> bool:
    """Builds an engine, measures it and takes it down, with the results in `row`; returns whether ranks are lost."""
    config = configure(case, options, context, native)
    planned = _plan(config, native, context)
    row |= {
        "planned_seconds": planned.step_seconds,
        "planned_gib": planned.peak_gib,
        "planned_needed_gib": planned.needed_gib,
        "teacher_tensors": planned.teacher_tensors if config.objective.relations else "",
    }
    engine = None
    try:
        begin = time.perf_counter()
        engine = Engine(config, native, context, load_model if Path(options.model).is_dir() else random_model)
        row["build_seconds"] = time.perf_counter() - begin
        row |= measure(engine, native.vocab_size, planned, options)
        row["status"] = "ok"
    except RuntimeError as error:  # of torch, of NCCL and of cuBLAS
        if not isinstance(error, torch.OutOfMemoryError) and "out of memory" not in str(error):
            raise
        row["status"] = "out of memory"
    lost = not _agree(row["status"], hosts, context)
    if lost:
        row["status"] = f"{row['status']}; ranks are lost"
        return True
    if engine is not None:
        _take_down(engine)
        engine = None
    parameter_offload.FWD_MODULE_STACK.clear()  # DeepSpeed leaves the model of the last forward pass there
    gc.collect()
    if context.device.type == "cuda":
        torch.cuda.empty_cache()
        row["left_gib"] = torch.cuda.memory_allocated() / 2**30
    return False


def measure(engine: Engine, vocab_size: int, planned: plan.Plan, options: argparse.Namespace) -> dict[str, Any]:
    """Warms up, times the steps and, where asked, profiles one more; values for COLUMNS."""
    config, context = engine.config, engine.context
    on_gpu = context.device.type == "cuda"
    timer, laps, tokens, loss = metrics.StepTimer(context.device), [], 0, 0.0
    for step in range(options.warmup + options.steps):
        if on_gpu and step == options.warmup:
            torch.cuda.reset_peak_memory_stats()
        batch = synthetic_batch(config, vocab_size, context, step)
        context.barrier()
        timer.lap()
        result = engine.step([batch], step)
        laps.append(timer.lap())
        tokens, loss = result.tokens, result.loss
    figures: dict[str, Any] = {}
    if on_gpu:
        peaks = torch.tensor(
            [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()], device=context.device
        )
        dist.all_reduce(peaks, dist.ReduceOp.MAX)
        figures |= {"peak_gib": int(peaks[0]) / 2**30, "reserved_gib": int(peaks[1]) / 2**30}
    if options.profile is not None:
        batch = synthetic_batch(config, vocab_size, context, len(laps))
        folder = options.profile / folder_name(config)
        with profiling.traced(folder if context.is_main else None, context.device):
            engine.step([batch], len(laps))
        if context.is_main:
            print(f"profile: {profiling.in_words(profiling.read_summary(folder))}", file=sys.stderr, flush=True)
    measured = laps[options.warmup :]
    seconds = statistics.median(measured)
    peak = metrics.peak_tflops(context.device, config.metrics.peak_tflops)
    return {
        **figures,
        "seconds": seconds,
        "fastest": min(measured),
        "slowest": max(measured),
        "steps": len(measured),
        "first_step_seconds": laps[0],
        "tokens_per_second_per_gpu": tokens / seconds / context.world_size,
        "mfu": None if peak is None else planned.flops / seconds / context.world_size / (peak * 1e12),
        "loss": loss,
    }


def _take_down(engine: Engine) -> None:
    """Waits for the GPU and empties the engine: classes that DeepSpeed makes for its hooks hold the model for ever."""
    inner: Any = engine.engine
    inner.destroy()
    for parameter in inner.module.parameters():
        parameter.grad = None
        for tensor in (parameter, getattr(parameter, "ds_tensor", None)):
            if tensor is not None:
                tensor.data = tensor.new_empty(0)
    for holder in (getattr(inner.optimizer, "parameter_offload", None), inner.optimizer, inner):
        if holder is not None:
            vars(holder).clear()


def random_model(config: Config, model_config: PretrainedConfig) -> torch.nn.Module:
    """The base with random weights, made where they belong: partitioned at once under ZeRO-3, else on the GPU."""
    torch.manual_seed(config.train.seed)
    partitioned = ds_config.zero_stage(ds_config.complete(config)) == 3
    on_gpu = torch.cuda.is_available() and not partitioned
    with torch.device("cuda", torch.cuda.current_device()) if on_gpu else contextlib.nullcontext():
        model = AutoModelForCausalLM.from_config(
            model_config, dtype=DTYPES[config.model.precision], attn_implementation=ATTENTION
        )
    model.config.use_cache = False
    return model.requires_grad_(False).eval()


def synthetic_batch(config: Config, vocab_size: int, context: ParallelContext, step: int) -> dict[str, torch.Tensor]:
    """Random tokens [B, T], one document a row; equal on the ranks of a sequence-parallel group."""
    shape = (config.train.micro_batch_size, config.data.seq_len)
    generator = torch.Generator().manual_seed(1000 * step + context.data_parallel_rank)
    ids = torch.randint(vocab_size, shape, generator=generator)
    labels = torch.cat([ids[:, 1:], torch.full((shape[0], 1), -100)], 1)
    positions = torch.arange(shape[1]).expand(shape).contiguous()
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "segment_ids": torch.zeros_like(ids)}


def _plan(config: Config, native: PretrainedConfig, context: ParallelContext) -> plan.Plan:
    on = cluster.resolve(config.cluster, _size(context), context.world_size)
    return plan.plan_run(config, costs.dimensions_of(native), ds_config.complete(config), on)


def _size(context: ParallelContext) -> int:
    return context.sequence_parallel_size


def _agree(status: str, hosts: Any, context: ParallelContext) -> bool:
    """Whether all ranks are here with the same status and their GPUs come to rest."""
    found: list[Any] = [None] * context.world_size
    try:
        dist.monitored_barrier(hosts, timeout=WAIT)
        dist.all_gather_object(found, status, group=hosts)
    except RuntimeError:
        return False
    if len(set(found)) != 1:
        return False
    if status == "ok" or context.device.type != "cuda":
        return True
    rest = threading.Thread(target=torch.cuda.synchronize, args=(context.device,), daemon=True)
    rest.start()
    rest.join(timeout=WAIT.total_seconds())
    calm = [not rest.is_alive()] * context.world_size
    dist.all_gather_object(calm, calm[0], group=hosts)
    return all(calm)


def _conditions(options: argparse.Namespace, context: ParallelContext) -> dict[str, Any]:
    """What is the same in every line of the CSV."""
    return {
        "sequence_parallel_size": _size(context),
        "world_size": context.world_size,
        "model": options.model,
        "lora_rank": options.lora_rank,
        "deepspeed_config": options.deepspeed,
        "overrides": " ".join(options.set),
        "transformers": version("transformers"),
        "deepspeed": version("deepspeed"),
        **conditions(context.device, options.commit),
    }


def _line(row: dict[str, Any]) -> str:
    """One aligned line of the table."""
    cells = [row["case"], f"{row['seq_len']:,}", row["micro_batch_size"]]
    if row["status"] != "ok":
        return LAYOUT.format(*cells, row["status"], *[""] * (len(TITLES) - 4)).rstrip()

    def number(name: str, form: str) -> str:
        return "-" if row.get(name) is None else format(row[name], form)

    seconds = f"{row['seconds']:.3f} ({row['fastest']:.2f}..{row['slowest']:.2f})"
    cells += [seconds, number("tokens_per_second_per_gpu", ",.0f"), number("mfu", ".3f"), number("over_next", ".2f")]
    cells += [number("peak_gib", ".1f"), number("planned_seconds", ".3f"), number("seconds_error", "+.0%")]
    cells += [number("planned_gib", ".1f"), number("gib_error", "+.0%")]
    return LAYOUT.format(*cells)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked, with `list`: the cases in order. Raises UserError, which names option and remedy."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--model", default="llama2-7b", metavar="SHAPE_OR_FOLDER", help=f"{', '.join(MODELS)}, or a model's folder")
    add("--cases", type=list_of(case_name), default="issue", metavar="CASE,CASE", help="or issue, stage1 (see above)")
    add("--lengths", type=list_of(positive), metavar="N,N", help="tokens of a sequence (32768, or the preset's)")
    add("--micro-batch-sizes", type=list_of(positive), metavar="N,N", help="sequences a rank and step (1)")
    add("--steps", type=positive, default=5, metavar="N", help="that are measured")
    add("--warmup", type=whole, default=2, metavar="N", help="steps before them; the very first compiles kernels")
    add("--lora-rank", type=positive, default=1024, metavar="N")
    add("--teacher-tensors", choices=(*plan.TEACHER_TENSORS, "auto"), help="(auto)")
    add("--sequence-parallel-size", type=positive, metavar="P", help="(all ranks; stage1: 1)")
    add("--deepspeed", default="ds_configs/zero3.json", metavar="JSON")
    add("--precision", choices=DTYPES, default="bf16")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of the configuration")
    add("--limit-seconds", type=positive, default=540, metavar="N", help="start no case that would end later")
    add("--profile", type=Path, metavar="FOLDER", help="trace and summary of one more step of each case")
    add("--csv", type=Path, metavar="PATH", help="one line a case, with all conditions; overwritten")
    add("--commit", metavar="TEXT", help="what to write as commit where git cannot tell")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher adds it
    options = parser.parse_args(arguments)
    if options.model not in MODELS and not Path(options.model).is_dir():
        raise UserError(f"--model: {options.model} is neither a folder nor one of {', '.join(MODELS)}")
    if options.csv is not None and (options.csv.is_dir() or not os.access(options.csv.absolute().parent, os.W_OK)):
        raise UserError(f"--csv: {options.csv} cannot be written; name a file in an existing folder")
    options.list = cases_of(options.cases, options.lengths, options.micro_batch_sizes)
    if options.cases == ["stage1"]:
        options.sequence_parallel_size = options.sequence_parallel_size or 1
    return options


if __name__ == "__main__":
    sys.exit(main())
