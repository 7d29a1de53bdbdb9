"""Plain dictionaries to typed, frozen trees: unknown keys and wrong types are refused by name."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any

import yaml

from linearard.errors import UserError


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Sets `key.subkey=value` in place; the value is YAML, numbers index lists.

    Raises:
        UserError: not of this form, or the key leads nowhere.
    """
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {override!r}: write key.subkey=value")
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        raise UserError(f"override {override!r}: the value is not valid YAML; quote it") from None
    node: Any = raw
    parts = key.split(".")
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise UserError(
                    f"override {key}: {'.'.join(parts[:i])} is a list of {len(node)}; use a number below it"
                )
            if last:
                node[int(part)] = value
            else:
                node = node[int(part)]
        elif isinstance(node, dict):
            if last:
                node[part] = value
            else:
                if node.get(part) is None:
                    node[part] = {}
                node = node[part]
        else:
            raise UserError(f"override {key}: {'.'.join(parts[:i])} is a plain value, it has no {part}")


def build(kind: Any, raw: Any, where: str) -> Any:
    """Builds a value of type `kind` (dataclasses, unions, tuples, dictionaries, scalars) from plain `raw`.

    Raises:
        UserError: unknown key or wrong type; `where` is the name of the value in the message.
    """
    if dataclasses.is_dataclass(kind):
        if raw is None:
            raw = {}
        if not isinstance(raw, dict):
            raise UserError(f"{where or 'config'}: expected a mapping of keys, got {raw!r}")
        hints = typing.get_type_hints(kind)
        unknown = [str(key) for key in raw if key not in hints]
        if unknown:
            name = f"{where}.{unknown[0]}" if where else unknown[0]
            raise UserError(f"{name}: unknown key; known here: {', '.join(hints)}")
        values = {key: build(hints[key], value, f"{where}.{key}" if where else key) for key, value in raw.items()}
        return typing.cast(Any, kind)(**values)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return _build_union(arguments, raw, where)
    if origin is tuple:
        if not isinstance(raw, list | tuple):
            raise UserError(f"{where}: expected a list, got {raw!r}")
        return tuple(build(arguments[0], item, f"{where}.{i}") for i, item in enumerate(raw))
    if origin is dict:
        if raw is None:
            return {}
        if not isinstance(raw, dict):
            raise UserError(f"{where}: expected a mapping, got {raw!r}")
        return {str(key): build(arguments[1], value, f"{where}.{key}") for key, value in raw.items()}
    if kind is Any:
        return raw
    return _build_scalar(kind, raw, where)


def _build_union(arguments: tuple[Any, ...], raw: Any, where: str) -> Any:
    if raw is None and type(None) in arguments:
        return None
    kinds = [kind for kind in arguments if kind is not type(None)]
    for kind in kinds:
        try:
            return build(kind, raw, where)
        except UserError:
            continue
    names = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
    raise UserError(f"{where}: expected {names}, got {raw!r}")


def _build_scalar(kind: type, raw: Any, where: str) -> Any:
    if kind is float and not isinstance(raw, bool):
        try:  # YAML 1.1 reads 1e-5 as a string
            number = float(raw)
        except (TypeError, ValueError):
            number = math.nan
        if math.isfinite(number):
            return number
    if kind is int and isinstance(raw, int) and not isinstance(raw, bool):
        return raw
    if kind in (bool, str) and isinstance(raw, kind):
        return raw
    raise UserError(f"{where}: expected {kind.__name__}, got {raw!r}")
