"""Whether the kernels fit the GPUs that they are for: compile_kernels.py compiles them, which takes no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="compiling kernels needs triton, which is not installed")
_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
pytestmark = pytest.mark.skipif(
    _TRITON < (3, 6),
    reason=f"the Hopper kernels need triton 3.6 or newer; this is {triton.__version__}",
)

_SCRIPT = Path(__file__).with_name("compile_kernels.py")
_KERNELS = Path(__file__).parents[2] / "kernels"
# Bytes of shared memory that a block can have: on Hopper, and on the least of the GPUs from Ampere on.
_HOPPER, _LEAST = 227 * 1024, 99 * 1024
# Bytes that a Hopper multiprocessor has for all blocks, and what it keeps of them for each.
_MULTIPROCESSOR, _RESERVED = 228 * 1024, 1024


def compile_kernels(kind: str, cases: list[dict[str, Any]], cache: Path) -> list[dict[str, Any]]:
    """The script's lines."""
    # conftest.py has set it for this process.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    environment["PYTHONPATH"] = os.pathsep.join([str(_KERNELS), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(_SCRIPT), kind, *(json.dumps(case) for case in cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("head_dim", "variants"),
    [
        (64, [{"segments": False}, {"segments": True, "attention": True}, {"segments": True, "visit": True}]),
        (96, [{"segments": False}, {"segments": True, "attention": True}, {"segments": False, "visit": True}]),
        (
            128,
            [
                {"segments": False},
                {"segments": True},
                {"segments": True, "attention": True},
                {"segments": False, "visit": True},
                {"segments": True, "visit": True},
            ],
        ),
    ],
    ids=["64", "96", "128"],
)
def test_hopper_kernels(
    head_dim: int, variants: list[dict[str, bool]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """They have all the registers there are, and nearly all of the shared memory: a little more would not fit."""
    case = {"architecture": "sm_90", "head_dim": head_dim, "dtype": "bfloat16"}
    cases = [case | variant for variant in variants]
    compiled = compile_kernels("hopper", cases, tmp_path_factory.mktemp("triton"))
    names = [kernel["name"] for kernel in compiled]
    visits = sum(variant.get("visit", False) for variant in variants)
    assert names.count("forward_kernel") == 2 + visits and names.count("backward_kernel") == len(variants)
    for kernel in compiled:
        constants = kernel["constants"]
        assert constants["K"] == head_dim, kernel
        assert kernel["shared"] <= _HOPPER, kernel
        assert not kernel["serialized"], kernel
        if kernel["name"] == "forward_kernel":  # two on a multiprocessor, each with three warpgroups
            assert 2 * (kernel["shared"] + _RESERVED) <= _MULTIPROCESSOR, kernel
            assert 2 * 3 * 128 * kernel["registers"] <= 2**16, kernel
        plain = not constants["SEGMENTS"] and (constants.get("SELF", True) or constants["VISIT"])
        spills = [kernel["spill_stores"]]
        if plain or _TRITON >= (3, 7):  # 3.6 reads one spilled address again wherever a barrier is waited for
            spills.append(kernel["spill_loads"])
        assert max(spills) <= (64 if plain else 160), kernel
        # What counts is what each tile of keys comes by: at least one loop of every warpgroup with products.
        parts = constants["PARTS"] + 1 if kernel["name"] == "backward_kernel" else 2
        assert len(kernel["loops"]) >= parts, kernel
        assert max(loop["spills"] for loop in kernel["loops"]) <= (10 if constants["SEGMENTS"] else 0), kernel
        # Two in the loop of the keys' gradient took 4 % of backward.
        assert not any(loop["divisions"] for loop in kernel["loops"]), kernel


@pytest.mark.parametrize(("head_dim", "dtype"), [(192, "float16"), (256, "bfloat16")])
def test_wide_hopper_kernels(head_dim: int, dtype: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """They too have all the registers there are, and nearly all of the shared memory."""
    case = {"architecture": "sm_90", "head_dim": head_dim, "dtype": dtype}
    variants = [
        {"segments": segments, "attention": attention} for segments in (False, True) for attention in (False, True)
    ]
    compiled = compile_kernels("hopper", [case | variant for variant in variants], tmp_path_factory.mktemp("triton"))
    names = [kernel["name"] for kernel in compiled]
    # For attention_kl backward is two kernels.
    assert names.count("wide_forward_kernel") == 2 and names.count("wide_backward_kernel") == 6, names
    for kernel in compiled:
        constants = kernel["constants"]
        assert (constants["D"], constants["K"]) == (256, head_dim), kernel
        assert kernel["shared"] <= _HOPPER, kernel
        assert not kernel["serialized"], kernel
        assert max(kernel["spill_stores"], kernel["spill_loads"]) <= (128 if constants["SEGMENTS"] else 64), kernel


@pytest.mark.parametrize("head_dim", [64, 128])
def test_hopper_kernels_of_deterministic_mode(head_dim: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    case = {"architecture": "sm_90", "head_dim": head_dim, "dtype": "bfloat16", "deterministic": True}
    cases = [case | {"segments": False}, case | {"segments": True, "attention": True}]
    compiled = compile_kernels("hopper", cases, tmp_path_factory.mktemp("triton"))
    names = [kernel["name"] for kernel in compiled]
    assert names.count("forward_kernel") == 2 and names.count("wide_backward_kernel") == 3, names
    for kernel in compiled:
        assert kernel["constants"]["K"] == head_dim and kernel["constants"].get("OWN", True), kernel
        assert not kernel["serialized"], kernel
        room = 1 if kernel["name"] == "wide_backward_kernel" else 2
        assert room * (kernel["shared"] + _RESERVED) <= _MULTIPROCESSOR, kernel
        most = 160 if kernel["constants"]["SEGMENTS"] else 64
        assert max(kernel["spill_stores"], kernel["spill_loads"]) <= most, kernel


def test_general_kernels(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Shared memory of what takes the most by each entry of the tile tables; segments make no difference.

    The small kernels of visits compile, too.
    """
    kinds = [
        ("sm_90", "bfloat16", 128),
        ("sm_89", "bfloat16", 128),
        ("sm_89", "bfloat16", 256),
        ("sm_80", "float32", 256),
    ]
    # Of aligned ones Hopper has kernels of its own, beside which a general one does rows again.
    cases = [
        {"architecture": architecture, "dtype": dtype, "head_dim": head_dim, "segments": False, "aligned": False}
        for architecture, dtype, head_dim in kinds
    ]
    hopper = {"architecture": "sm_90", "dtype": "bfloat16", "segments": False}
    cases += [hopper | {"head_dim": 128}, hopper | {"head_dim": 256, "visit": True}]
    compiled = compile_kernels("general", cases, tmp_path_factory.mktemp("triton"))
    sized = [(kernel["name"], kernel["architecture"], kernel["constants"].get("HEAD_DIM")) for kernel in compiled]
    assert sized == [
        *((name, kind[0], kind[2]) for kind in kinds for name in ("forward_kernel", "backward_kernel")),
        ("forward_again_kernel", "sm_90", 128),
        ("finish_kernel", "sm_90", None),
        ("forward_kernel", "sm_90", 256),
        ("conclude_kernel", "sm_90", None),
        *[("backward_kernel", "sm_90", 256)] * 2,
    ]
    for kernel in compiled:
        assert kernel["shared"] <= (_HOPPER if kernel["architecture"] == "sm_90" else _LEAST), kernel
