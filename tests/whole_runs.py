"""Whole runs for tests: trained to their end, killed while they save, resumed; their workers and what they leave."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import ds_json, raw_config, run, tiny_model
from tiny_text import write_texts, write_tokenizer

HELD_OUT = 0.25
STEPS = 4
PROBE = torch.arange(3, 83).reshape(2, 40) % 84  # tokens for comparing students, beyond the native window


def config_of(base: str, texts: Path, run_dir: Path, **sections: Any) -> Any:
    """The checked configuration of a short run; `sections` are merged over it, `stage` is ZeRO's."""
    from linearard import config as configuration

    raw = raw_config(Path(base), run_dir, deepspeed=ds_json(run_dir.parent / "ds", sections.pop("stage", 3)))
    raw["model"]["path"] = base
    raw["model"]["lora"] = {"r": 4, "alpha": 8.0, "dropout": 0.2}
    raw["data"] |= {"sources": [{"path": str(texts)}], "cache_dir": str(run_dir.parent / "cache")}
    raw["data"]["held_out_fraction"] = HELD_OUT
    raw["train"] |= {"max_steps": STEPS, "save_every": 2, "learning_rate": 1e-2}
    raw["evaluation"] = {"multiples": [1, 4], "max_windows": 1000}
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section}
    config = configuration.from_dict(raw)
    configuration.check(config)
    return config


def _run(config: Any, context: Any, probe: Path | None = None) -> None:
    """`linearard.train` without its command line; keeps the final student's logits of PROBE."""
    from linearard import trainer
    from linearard.capture import AttentionPass
    from linearard.layout import whole_sequence
    from linearard.models.student import load_model_config

    evaluate = trainer.evaluate

    def evaluate_and_probe(config: Any, native: Any, context: Any, engine: Any, corpus: Any) -> Any:
        ids, positions, segments = whole_sequence(PROBE, context.device)
        engine.module.eval()
        with torch.no_grad():
            output = engine.module(input_ids=ids, position_ids=positions, attention_pass=AttentionPass(segments))
        engine.module.train()
        if context.is_main:
            torch.save(output.logits, probe)
        return evaluate(config, native, context, engine, corpus)

    native = load_model_config(config.model)
    trainer.check_run(config, native)
    trainer.evaluate = evaluate if probe is None else evaluate_and_probe
    try:
        trainer.run(config, native, context)
    finally:
        trainer.evaluate = evaluate


def _train_and_die(size: int, model: str, texts: str, out: str, others: bool) -> None:
    """Worker: one run to its end, runs of other kinds, and one that is killed while it saves its second checkpoint."""
    from linearard import checkpoint, parallel

    context, folder = parallel.initialize(size), Path(out)
    sections = {"parallel": {"sequence_parallel_size": size}}
    _run(config_of(model, Path(texts), folder / "whole", **sections), context, folder / "whole.pt")
    if others:
        _other_runs(model, Path(texts), folder, context)

    random_state, calls = checkpoint._random_state, 0

    def dies_at_the_second(device: torch.device) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            context.barrier()
            os.kill(os.getpid(), signal.SIGKILL)
        return random_state(device)

    checkpoint._random_state = dies_at_the_second
    _run(config_of(model, Path(texts), folder / "killed", **sections), context)


def _other_runs(model: str, texts: Path, folder: Path, context: Any) -> None:
    qkv = config_of(
        model, texts, folder / "qkv", stage=2,
        model={"trainable": "qkv"}, train={"save_every": 1, "keep_checkpoints": 2},
    )  # fmt: skip
    _run(qkv, context, folder / "qkv.pt")
    tied = str(Path(model).with_name("tied"))
    _run(
        config_of(tied, texts, folder / "full", model={"trainable": "full"}, train={"max_steps": 2}),
        context,
        folder / "full.pt",
    )
    from tools.export_hf import export

    hub = config_of(
        "org/tiny", texts, folder / "hub",
        model={"revision": "v1", "trainable": "qkv"}, train={"max_steps": 1},
        metrics={"tensorboard": True, "progress": False},
    )  # fmt: skip
    _run(hub, context, folder / "hub.pt")
    export(folder / "hub", folder / "hub-export")


def _resume(size: int, model: str, texts: str, out: str, two_ranks: str) -> None:
    """Worker: goes on with the killed run, then asks for what must be refused."""
    from linearard import parallel
    from linearard.errors import UserError

    context, folder = parallel.initialize(size), Path(out)
    sections = {"parallel": {"sequence_parallel_size": size}}
    _run(config_of(model, Path(texts), folder / "killed", **sections), context, folder / "killed.pt")
    messages: dict[str, str | None] = {}

    def ask(name: str, config: Any) -> None:
        try:
            _run(config, context)
            messages[name] = None
        except UserError as error:
            messages[name] = str(error)

    whole = folder / "whole"
    ask("again", config_of(model, Path(texts), whole, **sections))
    ask("moved", config_of(str(Path(model).with_name("moved")), Path(texts), whole, **sections))
    ask("rate", config_of(model, Path(texts), whole, train={"learning_rate": 2e-2}, **sections))
    ask("afresh", config_of(model, Path(texts), whole, train={"resume": False}, **sections))
    ask("rope", config_of(model, Path(texts), whole, model={"rope_parameters": {"rope_type": "linear", "factor": 4.0}}))
    ask("base", config_of(str(Path(model).with_name("other")), Path(texts), whole, **sections))
    if two_ranks:
        ask("ranks", config_of(model, Path(texts), Path(two_ranks) / "whole"))
    if context.is_main:
        (folder / "messages.json").write_text(json.dumps(messages))


@dataclass(frozen=True)
class Runs:
    """Where the runs of one world size are, and what the disk held right after the kill."""

    folder: Path
    model: Path
    texts: Path
    after_kill: dict[str, Any]

    @property
    def messages(self) -> dict[str, str | None]:
        return json.loads((self.folder / "messages.json").read_text())

    def records(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]


def write_materials(folder: Path) -> tuple[Path, Path]:
    """Returns (base model, texts); beside it `moved` is a copy, `other` has other weights, `tied` ties embeddings."""
    shape = {"intermediate_size": 2048, "initializer_range": 0.1}  # frozen weights that would show in a checkpoint
    model = tiny_model("llama", folder / "model", **shape)
    write_tokenizer(model)
    shutil.copytree(model, folder / "moved")
    shutil.copytree(model, folder / "other")
    tiny_model("llama", folder / "other", rms_norm_eps=1e-5, **shape)
    write_tokenizer(tiny_model("llama", folder / "tied", tie_word_embeddings=True))
    for revision, source in (("main", "other"), ("v1", "model")):
        snapshot = folder / "hub" / "models--org--tiny" / "snapshots" / f"commit-of-{revision}"
        shutil.copytree(folder / source, snapshot)
        reference = folder / "hub" / "models--org--tiny" / "refs" / revision
        reference.parent.mkdir(exist_ok=True)
        reference.write_text(snapshot.name)
    return model, write_texts(folder / "texts")


def make_runs(world: int, folder: Path, materials: tuple[Path, Path], two_ranks: str) -> Runs:
    """The runs of one world size in `folder`; `two_ranks`: the folder of two ranks' runs, to ask one rank about."""
    model, texts = materials
    arguments = (world, str(model), str(texts), str(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_CACHE", str(model.with_name("hub")))
        with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
            run(world, _train_and_die, folder / "first", *arguments, world == 1)
    killed = folder / "killed"
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # killed in the middle of a line, too
    after_kill = {
        "checkpoints": {
            path.name: (path / "manifest.json").exists() for path in sorted((killed / "checkpoints").glob("step-*"))
        },
        "latest": (killed / "checkpoints" / "latest").read_text(),
        "metrics": (killed / "metrics.jsonl").read_text(),
    }
    run(world, _resume, folder / "second", *arguments, two_ranks)
    return Runs(folder, model, texts, after_kill)
