r"""Compiles the kernels that the Triton backend launches, for a GPU that need not be there.

    python compile_kernels.py hopper \
        '{"architecture": "sm_90", "head_dim": 128, "dtype": "bfloat16", "segments": true}' ...

It is the package's own launching code that runs, on tensors of the CPU, so that types, tile sizes and options are those
of a real launch. In the place of a launch the kernel is compiled, or passed over: of "hopper" and "general", the first
means those in Gluon and the second the others. Hence a process of its own, and one without TRITON_INTERPRET.

One line of JSON a kernel: architecture, name, constants, and shared, bytes of shared memory a block. Of the Hopper
kernels also what ptxas says: registers, a thread; spill_stores and spill_loads, bytes in a thread's code; serialized,
whether asynchronous products had to be made to wait for each other. And loops: of each innermost loop with products
spills, how many of its instructions load or store what is spilled, and divisions, of integers too, which Triton moves
out of no loop. The others are not given to ptxas: float32 products would take it long.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from typing import Any
from unittest.mock import patch

import torch
import triton
from relation_kl import triton_backend, triton_visit
from relation_kl.torch_backend import Operands
from relation_kl.torch_visit import State, Visit
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

_run: Any = JITFunction.run


class Driver:
    """As much of a driver as it takes to compile. Devices are numbered by what they can do: 90 is an sm_90."""

    device = 90

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.device, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


def without_ptxas(backend: Any = None, stages: dict[str, Any] | None = None, *_: Any) -> Any:
    """For `knobs.runtime.add_stages_inspection_hook`; called without arguments, it is asked for the cache's key."""

    def no_ptx(source: Any, metadata: dict[str, Any]) -> str:
        metadata["name"] = "none"
        return ""

    if stages is not None:
        stages |= {"ptx": no_ptx, "cubin": lambda source, metadata: b""}
    return "without ptxas", "without ptxas"


def machine_code(log: str) -> dict[str, Any]:
    """What ptxas -v says."""

    def most(pattern: str) -> int:
        return max(int(number) for number in re.findall(pattern, log))

    return {
        "registers": most(r"Used (\d+) registers"),
        "spill_stores": most(r"(\d+) bytes spill stores"),
        "spill_loads": most(r"(\d+) bytes spill loads"),
        "serialized": re.search(r"\bC751\d\b|Potential Performance Loss", log) is not None,
    }


def loops(cubin: bytes) -> list[dict[str, int]]:
    """Of each innermost loop with products, in order; masks that few tiles need are counted with it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code = [(int(place, 16), what.strip()) for place, what in re.findall(r"^\s+/\*(\w{4,})\*/\s+(.*?);", text, re.M)]
    # Other branches backwards, without a condition, come from where a barrier is waited for.
    branches = [(place, re.match(r"@!?U?P\d .*\bBRA\b.* 0x(\w+)$", what)) for place, what in code]
    ends = [(int(branch[1], 16), place) for place, branch in branches if branch and int(branch[1], 16) < place]
    bodies = {(begin, end): [what for place, what in code if begin <= place <= end] for begin, end in ends}
    with_products = [loop for loop in ends if any("HGMMA" in what for what in bodies[loop])]
    innermost = [
        (begin, end)
        for begin, end in with_products
        if not any(begin <= a and b <= end and (a, b) != (begin, end) for a, b in with_products)
    ]
    kinds = {"spills": r"\b(LDL|STL)\b", "divisions": r"\bMUFU\.RCP\b"}
    return [
        {kind: sum(re.search(pattern, what) is not None for what in bodies[loop]) for kind, pattern in kinds.items()}
        for loop in innermost
    ]


def launch(
    head_dim: int,
    dtype: str,
    segments: bool,
    attention: bool = False,
    deterministic: bool = False,
    visit: bool = False,
    aligned: bool = True,
) -> None:
    """Forward and backward, of a self-relation, of attention with half as many key heads, or of a visit; of inputs that
    TMA can read, or not."""
    torch.use_deterministic_algorithms(deterministic)
    stride = head_dim if aligned else head_dim + 1
    student, teacher = (torch.zeros(1, 2, 256, stride, dtype=getattr(torch, dtype))[..., :head_dim] for _ in range(2))
    if visit:
        student, teacher = (x[:, :, 128:] for x in (student, teacher))  # a chunk of a shard
        of_rows = torch.zeros(2, 1, 2, 128)  # of student and teacher
        row_ids = torch.zeros(1, 128, dtype=torch.int64) if segments else None
        both = Visit(student, teacher, student, teacher, row_ids, row_ids, False)
        state = State.start(of_rows)
        triton_visit.forward(both, 1.0, state)
        _, statistics = triton_visit.conclude(state, row_ids)
        gradients = [torch.zeros(triton_visit.gradient_shape(student)) for _ in range(2)]
        triton_visit.backward(both, 1.0, statistics, of_rows[0], *gradients)
        triton_visit.finish(gradients[0], None, student)
        return
    operands = Operands(student, student, teacher, teacher, True)
    if attention:
        operands = Operands(student, student[:, :1].clone(), teacher, teacher[:, :1].clone(), False)
    ids = torch.zeros(1, 256, dtype=torch.int64) if segments else None
    rows, statistics = triton_backend.forward(operands, 1.0, ids)
    triton_backend.backward(operands, 1.0, ids, statistics, rows)


def main(kind: str, *cases: str) -> None:
    """Compile what each case launches: an object of an architecture and of arguments of `launch`."""
    hopper = {"hopper": True, "general": False}[kind]
    driver: Any = Driver()
    seen: set[str] = set()

    def compile_and_print(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        if kernel.is_gluon() != hopper:
            return
        with redirect_stdout(io.StringIO()) as log:
            compiled = _run(kernel, *args, grid=grid, warmup=True, **options)
        if compiled.hash in seen:
            return
        seen.add(compiled.hash)
        line = {
            "architecture": f"sm_{driver.device}",
            "name": kernel.__name__,
            "constants": {name: value for name, value in options.items() if name.isupper()},
            "shared": compiled.metadata.shared,
        }
        if hopper:
            line |= machine_code(log.getvalue()) | {"loops": loops(compiled.asm["cubin"])}
        print(json.dumps(line, default=str), flush=True)

    triton.runtime.driver.set_active(driver)
    # From the cache there would be no log.
    knobs.compilation.always_compile = True
    if hopper:
        knobs.nvidia.dump_ptxas_log = True
    else:
        hook: Any = without_ptxas
        knobs.runtime.add_stages_inspection_hook = hook
    with patch.object(JITFunction, "run", compile_and_print):
        for case in map(json.loads, cases):
            architecture = case.pop("architecture")
            driver.device = int(architecture.removeprefix("sm_"))
            with patch.object(triton_backend, "_architecture", lambda device, name=architecture: name):
                launch(**case)


if __name__ == "__main__":
    main(*sys.argv[1:])
