"""Self-test for any machine: `python -m linearard.doctor [--config FILE]`.

Checks package versions, the kernel's loss and gradients on this device against the dense fp64 reference, gradients
where one tensor serves as q and k, and that student and teacher rotate differently. Says in words what is missing.
Exit status 0 if all checks pass, 1 if one fails, 2 for a mistake in the configuration.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from relation_kl import attention_kl, reference, relation_kl

from linearard.errors import UserError

# Version sets that were run (requirements.txt is the first).
TESTED = {
    "torch": ("2.13.0", "2.11.0"),
    "triton": ("3.7.1", "3.6.0"),
    "deepspeed": ("0.19.8",),
    "transformers": ("5.23.0", "5.17.0"),
    "peft": ("0.21.2",),
    "accelerate": ("1.15.0",),
    "datasets": ("5.2.0",),
    "sentencepiece": ("0.2.3", "0.2.2"),
    "mpi4py": ("4.1.2",),
    "tensorboard": ("2.21.0",),
}
OPTIONAL = {
    "triton": "the kernel runs on PyTorch instead; on a GPU install the version that torch asks for",
    "mpi4py": "only for starting with mpirun; pip install mpi4py and an MPI library",
    "tensorboard": "set metrics.tensorboard=false, or pip install tensorboard",
}


@dataclass(frozen=True)
class Finding:
    """One line of the report; status "ok", "note" (works, but) or "FAIL"."""

    status: str
    subject: str
    detail: str


def versions() -> Iterator[Finding]:
    """Installed packages against the tested sets."""
    for package, tested in TESTED.items():
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            if package in OPTIONAL:
                yield Finding("note", package, f"missing: {OPTIONAL[package]}")
            else:
                yield Finding("FAIL", package, "missing: pip install -r requirements.txt")
            continue
        if found.split("+")[0] in tested:
            yield Finding("ok", package, found)
        else:
            yield Finding("note", package, f"{found}; tested with {' and '.join(tested)}")
    if importlib.util.find_spec("flash_attn") is None:
        yield Finding("note", "flash-attn", "missing: PyTorch's own FlashAttention is used; see requirements-gpu.txt")
    if importlib.util.find_spec("mpi4py") is not None:
        try:
            from mpi4py import MPI

            yield Finding("ok", "MPI library", MPI.Get_library_version().split(",")[0].strip())
        except (ImportError, RuntimeError):
            yield Finding("note", "MPI library", "libmpi missing: only needed for mpirun (Debian: libopenmpi-dev)")


def device_of_choice() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def kernel_parity(device: torch.device) -> Iterator[Finding]:
    """Loss and gradient of relation_kl and attention_kl, each backend and dtype, against fp64 on the host."""
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else "CPU, no GPU found"
    yield Finding("ok" if on_gpu else "note", "device", name)
    backends = ["torch"]
    if on_gpu and importlib.util.find_spec("triton") is not None:
        backends.insert(0, "triton")
    for backend in backends:
        for dtype in (torch.float32, torch.bfloat16):
            yield _parity(device, backend, dtype)
    for backend in backends:
        yield _aliased(device, backend)


def _inputs(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(1, 4, 300, 64, generator=generator)
    teacher = student + 0.3 * torch.randn(1, 4, 300, 64, generator=generator)
    segments = torch.zeros(1, 300, dtype=torch.int32)
    segments[:, 130:] = 1
    segments[:, 290:] = -1
    return student.to(device, dtype), teacher.to(device, dtype), segments.to(device)


def _value_and_gradient(
    function: Callable[..., torch.Tensor], student: torch.Tensor, teacher: torch.Tensor, **kwargs: object
) -> tuple[torch.Tensor, torch.Tensor]:
    student = student.detach().requires_grad_()
    rows = function(student, teacher, **kwargs)
    weight = torch.linspace(0.5, 1.5, rows.shape[-1], device=rows.device, dtype=rows.dtype).expand_as(rows)
    (gradient,) = torch.autograd.grad(rows, student, weight)
    return rows.detach().double().cpu(), gradient.double().cpu()


def _error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


def _parity(device: torch.device, backend: str, dtype: torch.dtype) -> Finding:
    student, teacher, segments = _inputs(device, dtype)
    truth = _value_and_gradient(
        reference.relation_kl, student.double().cpu(), teacher.double().cpu(), segment_ids=segments.cpu()
    )
    plain = _value_and_gradient(reference.relation_kl, student, teacher, segment_ids=segments)
    ours = _value_and_gradient(relation_kl, student, teacher, segment_ids=segments, backend=backend)
    errors = [_error(a, b) for a, b in zip(ours, truth, strict=True)]
    budget = [max(2 * _error(a, b), 1e-5) for a, b in zip(plain, truth, strict=True)]
    good = all(error <= limit for error, limit in zip(errors, budget, strict=True))  # NaN compares false
    detail = f"relative error of loss {errors[0]:.1e} (at most {budget[0]:.1e}), "
    detail += f"of gradient {errors[1]:.1e} (at most {budget[1]:.1e})"
    return Finding("ok" if good else "FAIL", f"relation_kl {backend} {str(dtype)[6:]}", detail)


def _aliased(device: torch.device, backend: str) -> Finding:
    student, teacher, segments = _inputs(device, torch.float32)

    def self_attention(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda x, y, **kwargs: function(x, x, y, y, **kwargs)

    _, whole = _value_and_gradient(relation_kl, student, teacher, segment_ids=segments, backend=backend)
    _, parts = _value_and_gradient(
        self_attention(attention_kl), student, teacher, segment_ids=segments, backend=backend
    )
    error = _error(parts, whole)
    return Finding(
        "ok" if error < 1e-5 else "FAIL", f"aliased q = k {backend}", f"relative error of gradient {error:.1e}"
    )


def rope_difference(config_file: str | None) -> Iterator[Finding]:
    """inv_freq of student and teacher: of the configured model, or of a small Llama with linear scaling by 8."""
    from torch import nn
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from linearard.config import load_config
    from linearard.models.rope import RopeSwitch, scaled_config
    from linearard.models.student import load_model_config

    if config_file is None:
        native = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=256)
        scaled, subject, length = (
            scaled_config(native, {"rope_type": "linear", "factor": 8.0}, "refuse"),
            "a small Llama",
            2048,
        )
        kind: Any = LlamaRotaryEmbedding
    else:
        from transformers import AutoModelForCausalLM

        config = load_config(config_file)
        native = load_model_config(config.model)
        scaled = scaled_config(native, config.model.rope_parameters, config.model.existing_rope)
        subject, length = config.model.path, config.data.seq_len
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(native)
        kind = next(type(m) for name, m in skeleton.named_modules() if name.endswith("rotary_emb"))
    holder = nn.Module()
    holder.rotary_emb = kind(config=native)
    difference = RopeSwitch(holder, native, scaled, length, torch.device("cpu")).largest_difference()
    yield Finding("ok", "inv_freq", f"{subject}: student and teacher differ by up to {difference:.3g} (relative)")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="linearard.doctor", description=__doc__)
    parser.add_argument("--config", help="also check the RoPE of this run's model")
    options = parser.parse_args(arguments)
    failed = False
    try:
        for check in (versions(), kernel_parity(device_of_choice()), rope_difference(options.config)):
            for finding in check:
                print(f"{finding.status:5}{finding.subject:28}{finding.detail}", flush=True)
                failed |= finding.status == "FAIL"
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("something failed, see FAIL above" if failed else "all checks passed")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
