"""The cases of benchmark_training.py: their names and presets, the models they run, and their configurations."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from make_random_model import SHAPES
from measuring import checked
from transformers import LlamaConfig, PretrainedConfig

from linearard import config as configuration
from linearard.config import RELATIONS, Config, relations_of
from linearard.errors import UserError
from linearard.models.student import load_model_config, shape_of
from linearard.parallel import ParallelContext
from linearard.tree import apply_override

ISSUE = ("next", "qq+kk+vv@4096", "qq+kk+vv@full", "qq+kk+vv+next@4096")
STAGE1 = ("next", "qq+kk+vv@4096")
# name -> cases, lengths, micro-batch sizes
PRESETS = {"issue": (ISSUE, (32768,), (1,)), "stage1": (STAGE1, (4096,), (4, 8))}

TINY: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16}
MODELS: dict[str, dict[str, Any]] = {**SHAPES, "tiny": TINY}


class Case(NamedTuple):
    """What one engine is built for."""

    terms: tuple[str, ...]
    window: str
    seq_len: int
    micro_batch_size: int

    @property
    def name(self) -> str:
        terms = "+".join(self.terms)
        return terms if terms == "next" else f"{terms}@{self.window}"


def case_name(text: str) -> str:
    """The text, if it names a case or a preset; a type for argparse."""
    terms, _, window = text.partition("@")
    known = all(term in (*RELATIONS, "next") for term in terms.split("+"))
    fits = known and (window in ("", "full") or (window.isdecimal() and int(window) > 0))
    return checked(text, text in PRESETS or fits, f"choose {', '.join(PRESETS)}, or terms such as qq+kk+vv+next@4096")


def _build(name: str, seq_len: int, micro_batch_size: int) -> Case:
    terms, _, window = name.partition("@")
    whole = not window.isdecimal() or int(window) >= seq_len
    return Case(tuple(terms.split("+")), "full" if whole else window, seq_len, micro_batch_size)


def cases_of(
    names: Sequence[str], lengths: Sequence[int] | None, micro_batch_sizes: Sequence[int] | None
) -> list[Case]:
    """The cases in order; lengths and sizes that are not given are the preset's, else 32,768 tokens and 1.

    Raises:
        UserError: a preset among other names.
    """
    presets = [name for name in names if name in PRESETS]
    if presets and len(names) > 1:
        raise UserError(f"--cases: {presets[0]} stands alone; list single cases instead")
    names, usual_lengths, usual_sizes = PRESETS[presets[0]] if presets else (names, (32768,), (1,))
    return [
        _build(name, length, size)
        for length in lengths or usual_lengths
        for size in micro_batch_sizes or usual_sizes
        for name in names
    ]


def native_config(model: str) -> PretrainedConfig:
    """The configuration of a folder's model, or of one of MODELS."""
    if Path(model).is_dir():
        return load_model_config(configuration.ModelConfig(path=model))
    return LlamaConfig(**MODELS[model])


def configure(case: Case, options: argparse.Namespace, context: ParallelContext, native: PretrainedConfig) -> Config:
    """The configuration of a case, checked as a run's is."""
    relations = {name: 1.0 for name in case.terms if name != "next"}
    folder = Path(options.model)
    raw: dict[str, Any] = {
        "run_dir": "unused",
        "deepspeed": options.deepspeed,
        "model": {
            "path": str(folder) if folder.is_dir() else options.model,
            "rope_parameters": {"rope_type": "linear", "factor": 8.0},
            "lora": {"r": options.lora_rank, "alpha": 2.0 * options.lora_rank},
            "precision": options.precision,
        },
        "teacher": {"window": int(case.window) if case.window.isdecimal() else case.window},
        "objective": {"relations": relations, "next_token": 1.0 if "next" in case.terms else 0.0},
        "data": {"sources": [{"path": "unused"}], "seq_len": case.seq_len},
        "parallel": {"sequence_parallel_size": context.sequence_parallel_size},
        "train": {"micro_batch_size": case.micro_batch_size, "warmup_steps": 0, "max_steps": 10**6},
    }
    if options.teacher_tensors is not None:
        raw["teacher"]["tensors"] = options.teacher_tensors
    for override in options.set:
        apply_override(raw, override)
    config = configuration.from_dict(raw)
    configuration.check(config)
    configuration.check_against_model(config, shape_of(native))
    return config


def folder_name(config: Config) -> str:
    """A name for the files of a case."""
    terms = [*relations_of(config), *(["next"] if config.objective.next_token else [])]
    return f"{'_'.join(terms)}-{config.teacher.window}-{config.data.seq_len}x{config.train.micro_batch_size}"
