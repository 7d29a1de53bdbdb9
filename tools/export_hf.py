"""Turns a run or a checkpoint into an ordinary Hugging Face folder.

    python tools/export_hf.py RUN_OR_CHECKPOINT OUT [--adapter-only] [--base PATH] [--dtype bf16|fp32]

OUT holds merged weights, the tokenizer, and a config.json with the scaled rope_parameters and the stretched
max_position_embeddings; `AutoModelForCausalLM.from_pretrained(OUT)` needs nothing of this project.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from linearard import checkpoint, logs
from linearard.config import Config, from_dict
from linearard.data import load_tokenizer
from linearard.errors import UserError
from linearard.models.rope import scaled_config
from linearard.models.student import DTYPES, load_model_config, peft_config

log = logs.get_logger("export")


def export(source: Path, out: Path, *, adapter_only: bool = False, base: str | None = None, dtype: str = "") -> None:
    """Writes `out`.

    Args:
        source: a run directory (its newest checkpoint is taken) or a checkpoints/step-* folder.
        out: new or empty folder.
        adapter_only: write the LoRA adapter in PEFT's format, with the scaled config.json beside it.
        base: where the base model is now, if it moved since training.
        dtype: "bf16" or "fp32"; default: the precision of training.

    Raises:
        UserError: no checkpoint, a base that is not the one trained from, an `out` that is in use.
    """
    folder = checkpoint.newest(source) if (source / "checkpoints").is_dir() else source
    if folder is None:
        raise UserError(f"{source}: holds no checkpoint yet; train first")
    manifest = checkpoint.read_manifest(folder)
    config = from_dict(manifest["config"])
    path = base or config.model.path
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is not an empty folder; name a new one")
    if adapter_only and config.model.trainable != "lora":
        raise UserError(f"--adapter-only: {folder} trained {config.model.trainable}, there is no adapter; leave it out")
    try:
        identity = checkpoint.base_identity(path, config.model.revision)
    except UserError as error:
        raise UserError(f"{error}; if the base model has moved, name its folder with --base") from None
    if identity["sha256"] != manifest["base"]["sha256"]:
        raise UserError(f"{path}: is not the base model that {folder} was trained from; name it with --base")
    student = _student(config, folder, path, dtype or config.model.precision)
    out.mkdir(parents=True, exist_ok=True)
    if adapter_only:
        student.save_pretrained(str(out))
        student.config.save_pretrained(str(out))
    else:
        merged = student.merge_and_unload() if isinstance(student, PeftModel) else student
        merged.save_pretrained(str(out))
    _copy_tokenizer(config, path, out)
    log.info(
        "wrote %s: step %d, %s, max_position_embeddings %d",
        out,
        manifest["step"],
        student.config.rope_parameters,
        student.config.max_position_embeddings,
    )


def _student(config: Config, folder: Path, path: str, dtype: str) -> Any:
    """The trained student on the host, in `dtype`; adapters are not merged yet."""
    native = load_model_config(dataclasses.replace(config.model, path=path))
    scaled = scaled_config(native, config.model.rope_parameters, config.model.existing_rope)
    model: Any = AutoModelForCausalLM.from_pretrained(
        path, revision=config.model.revision, config=scaled, dtype=DTYPES[dtype]
    )
    if config.model.trainable == "lora":
        model = get_peft_model(model, peft_config(config.model.lora), autocast_adapter_dtype=False)
    trained: Any = get_fp32_state_dict_from_zero_checkpoint(
        str(folder.parent), tag=folder.name, exclude_frozen_parameters=True
    )
    parameters = dict(model.named_parameters(remove_duplicate=False))  # tied weights go by both names
    unknown = [name for name in trained if name not in parameters]
    if unknown:
        raise UserError(f"{folder}: holds {unknown[0]}, which {path} has not; it was trained from another model")
    with torch.no_grad():
        for name, value in trained.items():
            parameters[name].copy_(value)
    return model.eval()


def _copy_tokenizer(config: Config, path: str, out: Path) -> None:
    revision = None if config.model.tokenizer else config.model.revision
    load_tokenizer(config.model.tokenizer or path, revision).save_pretrained(str(out))
    sentencepiece = Path(config.model.tokenizer or path) / "tokenizer.model"
    if sentencepiece.exists() and not (out / "tokenizer.model").exists():
        shutil.copy(sentencepiece, out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="RUN_OR_CHECKPOINT")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--adapter-only", action="store_true", help="the LoRA adapter alone, in PEFT's format")
    parser.add_argument("--base", help="folder of the base model, if it moved since training")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="", help="default: the precision of training")
    options = parser.parse_args()
    logs.configure()
    try:
        export(options.source, options.out, adapter_only=options.adapter_only, base=options.base, dtype=options.dtype)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
