"""Configurations with some keys changed, and the message with which one is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from linearard import config as configuration
from linearard.config import from_dict
from linearard.errors import UserError
from linearard.models.student import load_model_config
from linearard.trainer import check_run


def changed(raw: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of `raw` with dotted keys set."""
    raw = json.loads(json.dumps(raw))
    for key, value in changes.items():
        node = raw
        *folders, last = key.split(".")
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = value
    return raw


def refusal(raw: dict[str, Any]) -> str:
    """The message that the whole chain of checks gives: reading, then everything that needs no weights."""
    with pytest.raises(UserError) as refused:
        config = from_dict(raw)
        configuration.check(config)
        check_run(config, load_model_config(config.model))
    message = str(refused.value)
    assert "\n" not in message
    return message
