"""Shared by all tests: one thread a process (tests run side by side), no network, tiny models."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports triton, which reads it then
    os.environ.setdefault("TRITON_INTERPRET", "1")

from distributed import raw_config, tiny_model

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama: 4 query and 2 key-value heads, native window of 16 tokens."""
    return tiny_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def raw(tmp_path: Path, llama: Path) -> dict[str, Any]:
    """A configuration that is right, for the model in `llama`; a copy for each test."""
    return raw_config(llama, tmp_path / "run")
