"""Checkpoints of a run: what is trained, the optimizer, and everything a resumed run needs to be the same run.

run_dir/checkpoints/step-000050/
    manifest.json          step, configuration, base model by reference and hash, world size
    rank-00000.pt          random states and the stream's position, one file a rank
    ...                    DeepSpeed's own files: trainable weights and optimizer state, frozen weights left out
run_dir/checkpoints/latest names the newest complete checkpoint; it is replaced last, atomically.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download

from linearard.config import Config, to_dict
from linearard.errors import UserError
from linearard.parallel import ParallelContext

LATEST = "latest"
# What may differ between a checkpoint and the run that goes on from it.
FREE = (
    "metrics",
    "evaluation",
    "run_dir",
    "train.save_every",
    "train.keep_checkpoints",
    "train.resume",
    "data.cache_dir",
    "data.num_proc",
    "cluster",
    "profile",
)


def newest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None.

    Raises:
        UserError: `latest` names a checkpoint that is not there.
    """
    pointer = run_dir / "checkpoints" / LATEST
    if not pointer.exists():
        return None
    folder = pointer.parent / pointer.read_text().strip()
    if not (folder / "manifest.json").exists():
        raise UserError(
            f"{pointer}: names {folder.name}, which is not complete; write the name of a complete one there"
        )
    return folder


def read_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json of a checkpoint.

    Raises:
        UserError: not a checkpoint folder.
    """
    try:
        return json.loads((folder / "manifest.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{folder}: not a complete checkpoint ({error})") from None


def save(
    engine: Any, config: Config, context: ParallelContext, step: int, stream: dict[str, Any], base: dict[str, str]
) -> Path:
    """Writes the checkpoint of `step` finished optimizer steps; all ranks call it.

    Args:
        engine: DeepSpeed's engine.
        config: the run.
        context: this rank's place.
        step: finished optimizer steps.
        stream: position of the data stream.
        base: reference and hash of the base model (`base_identity`).
    """
    root = Path(config.run_dir) / "checkpoints"
    folder = root / f"step-{step:06d}"
    if context.is_main and folder.exists():
        shutil.rmtree(folder)  # left half-written by a killed process
    context.barrier()
    engine.save_checkpoint(str(root), tag=folder.name, exclude_frozen_parameters=True, save_latest=False)
    torch.save({"random": _random_state(context.device), "stream": stream}, _rank_file(folder, context.rank))
    context.barrier()
    if context.is_main:
        manifest = {"step": step, "world_size": context.world_size, "base": base, "config": to_dict(config)}
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
        temporary = root / f".{LATEST}"
        temporary.write_text(folder.name)
        os.replace(temporary, root / LATEST)
        complete = sorted(path.parent for path in root.glob("step-*/manifest.json"))
        for old in complete[: -config.train.keep_checkpoints]:
            if old != folder:
                (old / "manifest.json").unlink()  # first: what a killed process leaves behind is not complete
                shutil.rmtree(old)
    context.barrier()
    return folder


def check_resumable(folder: Path, config: Config, context: ParallelContext, base: dict[str, str]) -> None:
    """Refuses to go on from a checkpoint of another run.

    Raises:
        UserError: names what differs.
    """
    manifest = read_manifest(folder)
    if manifest["world_size"] != context.world_size:
        raise UserError(
            f"{folder}: saved by {manifest['world_size']} processes, started with {context.world_size}; "
            f"start {manifest['world_size']} processes"
        )
    if manifest["base"]["sha256"] != base["sha256"]:
        raise UserError(
            f"model.path: {base['path']} is not the model that {folder} was trained from ({manifest['base']['path']}); "
            "restore it or use another run_dir"
        )
    old, new = _flat(manifest["config"]), _flat(to_dict(config))
    for key in sorted(old.keys() | new.keys()):
        free = any(key == name or key.startswith(f"{name}.") for name in FREE)
        if not free and old.get(key) != new.get(key) and key != "model.path":
            raise UserError(
                f"{key}: {new.get(key)} here, {old.get(key)} in {folder}; restore it to go on, or use another run_dir"
            )


def load(engine: Any, folder: Path, context: ParallelContext) -> tuple[int, dict[str, Any]]:
    """Restores weights, optimizer and random states; returns (finished steps, the stream's position)."""
    engine.load_checkpoint(str(folder.parent), tag=folder.name, load_module_strict=False)
    state = torch.load(_rank_file(folder, context.rank), map_location="cpu", weights_only=False)
    _restore_random_state(state["random"], context.device)
    return read_manifest(folder)["step"], state["stream"]


def base_identity(path: str, revision: str | None = None) -> dict[str, str]:
    """Reference and SHA-256 of the base model's configuration and weight files; downloads a model of the hub.

    Raises:
        UserError: no such folder or model, or no weights in it.
    """
    folder, kind = _weights(path, revision)
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix == kind or file.name == "config.json":
            digest.update(file.name.encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return {"path": path, "sha256": digest.hexdigest()}


def _weights(path: str, revision: str | None) -> tuple[Path, str]:
    """The base's folder, and the suffix of the weight files that transformers takes from it."""
    for kind in (".safetensors", ".bin"):
        folder = Path(path)
        if not folder.is_dir():
            try:
                folder = Path(snapshot_download(path, revision=revision, allow_patterns=["config.json", f"*{kind}"]))
            except (OSError, ValueError) as error:
                reason = str(error).strip().splitlines()[0]
                raise UserError(
                    f"model.path: {path}: no such folder, and not on the Hugging Face hub: {reason}"
                ) from None
        if any(folder.glob(f"*{kind}")):
            return folder, kind
    raise UserError(f"model.path: {path}: no .safetensors and no .bin file; restore the model's weights")


def _rank_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.pt"


def _random_state(device: torch.device) -> dict[str, Any]:
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
