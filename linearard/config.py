"""The configuration of a run, read from YAML and `key.subkey=value` overrides, and what follows from it.

`linearard.config_keys` lists every key, `linearard.config_checks` what is refused: unknown keys, wrong types and
combinations that cannot work raise `UserError` before anything starts. Both are used through this module.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from linearard.config_checks import ModelShape, check, check_against_model
from linearard.config_keys import (
    RELATIONS,
    ClusterConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    LoraConfig,
    MetricsConfig,
    ModelConfig,
    ObjectiveConfig,
    ParallelConfig,
    ProfileConfig,
    SourceConfig,
    TeacherConfig,
    TrainConfig,
)
from linearard.errors import UserError
from linearard.tree import apply_override, build

__all__ = [
    "RELATIONS",
    "ClusterConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "LoraConfig",
    "MetricsConfig",
    "ModelConfig",
    "ModelShape",
    "ObjectiveConfig",
    "ParallelConfig",
    "ProfileConfig",
    "SourceConfig",
    "TeacherConfig",
    "TrainConfig",
    "check",
    "check_against_model",
    "dump",
    "from_dict",
    "layers_of",
    "load_config",
    "relations_of",
    "teacher_window",
    "to_dict",
]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
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


def relations_of(config: Config) -> list[str]:
    """The relations whose weight is not 0."""
    return [name for name, weight in config.objective.relations.items() if weight]
