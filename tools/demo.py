"""`make demo`: stretches the shipped base model from 256 to 2048 tokens and restores it, on two CPU processes.

    python tools/demo.py [key.subkey=value ...]

Trains launch/demo.yaml through the deepspeed launcher (2 ranks, ZeRO-3, sequence_parallel_size 2) on the Python
standard library of this machine, exports the student, and scores three models on held-out files: native (the base as
it is), scaled (the base with RoPE x8, untrained) and restored (the exported student). Writes runs/demo/report.json,
report.md and loss_by_position.png.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from linearard import evaluation, logs
from linearard.config import Config, load_config
from linearard.data import Corpus, evaluation_windows, load_tokenizer, prepare, tokenizer_fingerprint
from linearard.errors import UserError
from linearard.models.rope import scaled_config
from linearard.models.student import load_model_config

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "runs" / "demo"
CONFIG = ROOT / "launch" / "demo.yaml"
MULTIPLE = 8  # the stretch, and the longest evaluation
SHORT_WINDOWS, LONG_WINDOWS = 256, 16


def main() -> int:
    logs.configure()
    os.chdir(ROOT)
    os.environ["DS_ACCELERATOR"] = "cpu"
    overrides = [f"data.sources.0.path={sysconfig.get_paths()['stdlib']}", *sys.argv[1:]]
    try:
        config = load_config(CONFIG, overrides)
        seconds = train(config, overrides)
        export(config)
        report = compare(config, seconds)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"error: {Path(error.cmd[2]).name} failed with status {error.returncode}; see above", file=sys.stderr)
        return error.returncode
    print(f"\n{(OUT / 'report.md').read_text()}\nwritten to {OUT.relative_to(ROOT)}/")
    return 0 if report["recovered"] > 0 else 1


def train(config: Config, overrides: Sequence[str]) -> float:
    """Runs the training job from its start; returns its seconds, start-up included."""
    print(
        f"1/3 training: {config.train.max_steps} steps of {config.data.seq_len} tokens x "
        f"{config.train.gradient_accumulation_steps}, 2 processes",
        flush=True,
    )
    shutil.rmtree(config.run_dir, ignore_errors=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(max((os.cpu_count() or 2) // 2, 1))}
    start = time.perf_counter()
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2"]
    launcher += ["--master_port", str(_free_port()), "--module", "linearard.train"]
    subprocess.run([*launcher, "--config", str(CONFIG), *overrides], check=True, env=environment)
    return time.perf_counter() - start


def export(config: Config) -> None:
    print("2/3 export", flush=True)
    shutil.rmtree(OUT / "model", ignore_errors=True)
    subprocess.run([sys.executable, "tools/export_hf.py", config.run_dir, str(OUT / "model")], check=True)


def compare(config: Config, train_seconds: float) -> dict[str, Any]:
    """Scores the three models and writes the reports."""
    print("3/3 evaluation of native, scaled and restored", flush=True)
    start = time.perf_counter()
    native = load_model_config(config.model)
    length = native.max_position_embeddings
    tokenizer = load_tokenizer(config.model.tokenizer or config.model.path)
    corpus = prepare(config.data, tokenizer, tokenizer_fingerprint(tokenizer), progress=True)
    scaled = scaled_config(native, config.model.rope_parameters, config.model.existing_rope)
    models = {
        "native": AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32),
        "scaled": AutoModelForCausalLM.from_pretrained(config.model.path, config=scaled, dtype=torch.float32),
        "restored": AutoModelForCausalLM.from_pretrained(OUT / "model", dtype=torch.float32),
    }
    positions = {name: _score(model.eval(), name, corpus, length) for name, model in models.items()}
    results = {name: evaluation.summary(short, long, length) for name, (short, long) in positions.items()}
    loss = {name: float(result["short_loss"]) for name, result in results.items()}  # type: ignore[arg-type]
    records = [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
    report: dict[str, Any] = {
        **results,
        "recovered": (loss["scaled"] - loss["restored"]) / (loss["scaled"] - loss["native"]),
        "export_difference": _export_difference(config, models["restored"], corpus, records, length),
        "tokens": max(record.get("tokens_seen", 0) for record in records),
        "seconds": train_seconds + time.perf_counter() - start,
        "training_seconds": train_seconds,
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__},
        "held_out": {"documents": len(corpus.held_out), "short_windows": SHORT_WINDOWS, "long_windows": LONG_WINDOWS},
    }
    (OUT / "report.json").write_text(json.dumps(report, indent=2))
    _plot({name: long for name, (_, long) in positions.items()}, length)
    (OUT / "report.md").write_text(_table(report, config, length))
    return report


Sums = tuple[evaluation.PositionSums, evaluation.PositionSums]


def _score(model: Any, name: str, corpus: Corpus, native: int) -> Sums:
    """Sums at the native length and at MULTIPLE times it."""
    short = evaluation_windows(corpus.held_out, native, SHORT_WINDOWS, allow_short=True)
    long = evaluation_windows(corpus.held_out, native * MULTIPLE, LONG_WINDOWS)
    if not short or not long:
        raise UserError("data.sources: no held-out file is long enough to evaluate on; add text")
    with tqdm(total=len(short) + len(long), desc=f"{name:>8}", unit="window") as bar:
        return (
            evaluation.score(_forward(model), short, native, batch_size=8, report=bar.update),
            evaluation.score(_forward(model), long, native * MULTIPLE, report=bar.update),
        )


def _forward(model: Any) -> evaluation.Forward:
    return lambda ids: model(input_ids=ids, use_cache=False).logits


def _export_difference(config: Config, restored: Any, corpus: Corpus, records: list[Any], native: int) -> float:
    """Loss of the exported folder less that of the trained student, on the windows that training ended with."""
    trained = next(record["evaluation"]["1x"] for record in reversed(records) if "evaluation" in record)
    windows = evaluation_windows(corpus.held_out, native, config.evaluation.max_windows, allow_short=True)
    return evaluation.score(_forward(restored), windows, native).mean_loss - trained["loss"]


def _table(report: dict[str, Any], config: Config, native: int) -> str:
    names = list(report["native"]["loss_by_length"])
    head = "| model | short loss | short accuracy | " + " | ".join(f"loss at {name}" for name in names) + " |"
    lines = [
        "# LinearARD demo",
        "",
        f"Base of {native} tokens, RoPE {config.model.rope_parameters}, held-out files of the Python standard library. "
        f"Loss in nats per token; short: windows of {native} tokens; 1x to {MULTIPLE}x: by position in windows of "
        f"{native * MULTIPLE}.",
        "",
        head,
        "|" + "---|" * (len(names) + 3),
    ]
    for name in ("native", "scaled", "restored"):
        row = report[name]
        losses = " | ".join(f"{row['loss_by_length'][key]:.3f}" for key in names)
        lines.append(f"| {name} | {row['short_loss']:.3f} | {row['short_accuracy']:.3f} | {losses} |")
    accuracy = report["restored"]["short_accuracy"] / report["native"]["short_accuracy"]
    lines += [
        "",
        f"- recovered: {report['recovered']:.3f} of the short-text loss that scaling cost",
        f"- short accuracy: {accuracy:.3f} of the native model's",
        f"- {report['tokens']:,} training tokens; {report['seconds']:.0f} s in all, {report['training_seconds']:.0f} s "
        f"of it training ({report['machine']['cpus']} CPUs)",
        f"- loss of the exported folder less the trained student's: {report['export_difference']:.1e}",
        "",
        "![loss by position](loss_by_position.png)",
    ]
    return "\n".join(lines) + "\n"


def _plot(positions: dict[str, evaluation.PositionSums], native: int, width: int = 64) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5))
    for name, sums in positions.items():
        starts = range(0, len(sums.count) - width + 1, width)
        losses = [sums.loss_between(start, start + width) for start in starts]
        axes.plot(np.asarray(starts) + width / 2, losses, label=name)
    axes.axvline(native, color="gray", linestyle=":", label="native window")
    axes.set(xlabel="position (tokens)", ylabel="loss (nats per token)", title="Held-out loss by position")
    axes.legend()
    figure.tight_layout()
    figure.savefig(OUT / "loss_by_position.png", dpi=120)
    plt.close(figure)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
