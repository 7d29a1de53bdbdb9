"""What the benchmarks share: options with their mistakes in one line, and the conditions of a measurement."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from linearard.errors import UserError


class Parser(argparse.ArgumentParser):
    """Says a mistake in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')} (--help shows all options)")


def list_of(parse_one: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A parser of comma-separated values; repeated ones count once."""
    return lambda text: list(dict.fromkeys(parse_one(part.strip()) for part in text.split(",")))


def positive(text: str) -> int:
    return int(checked(text, text.isdecimal() and int(text) > 0, "give a whole number from 1 on"))


def whole(text: str) -> int:
    return int(checked(text, text.isdecimal(), "give a whole number from 0 on"))


def checked(text: str, fits: bool, remedy: str) -> str:
    if not fits:
        raise argparse.ArgumentTypeError(f"{text!r} is not possible; {remedy}")
    return text


def conditions(device: torch.device, commit: str | None) -> dict[str, str]:
    """GPU, driver, versions and commit, for every line of a CSV.

    Args:
        device: that was measured.
        commit: what to write where git cannot tell, or shall not.
    """

    def output(*command: str) -> str:
        if shutil.which(command[0]) is None:
            return ""
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
        return result.stdout.strip() if result.returncode == 0 else ""

    on_gpu = device.type == "cuda"
    driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else "none"
    if commit is None:
        commit = output("git", "rev-parse", "--short", "HEAD")
        commit += " dirty" if commit and output("git", "status", "--porcelain", "--untracked-files=no") else ""
    return {
        "gpu": torch.cuda.get_device_name() if on_gpu else "no GPU",
        "driver": driver.split("\n")[0] or "unknown",
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "none",
        "commit": commit or "unknown",
    }
