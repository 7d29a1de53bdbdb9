"""The short way of launching runs the kernel that Triton would, on the same arguments. It takes no GPU to see that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from relation_kl import hopper_backend, hopper_wide_backend, segment_kernels, triton_backend
from relation_kl import launch as module
from relation_kl.launch import launch
from relation_kl.tiles import HOPPER_BLOCK
from relation_kl.torch_backend import Operands
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction


class Driver:
    """As much of a driver as it takes to launch what is not compiled."""

    device = 1000

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 7 * device


class Compiled(CompiledKernel):
    """Stands for what Triton has compiled under a key; writes down how it is run."""

    function: Any = "function"

    def __init__(self, key: str, runs: list[Any]) -> None:
        self.key, self.runs = key, runs
        self.packed_metadata = f"metadata of {key}"

    def launch_metadata(self, grid: Any, stream: Any, *arguments: Any) -> Any:
        return "metadata for hooks"

    def run(self, *arguments: Any) -> None:
        self.runs.append((self, *arguments))


class Recorder:
    """Runs of kernels, the number of launches that were Triton's own, and the kernels that were launched both ways."""

    def __init__(self) -> None:
        self.runs: list[Any] = []
        self.ordinary = 0
        self.kernels: list[str] = []

    def launch(self, kernel: Any, programs: Any, *arguments: Any, **constants: Any) -> None:
        """In Triton's way, then twice in ours, of which the second time is the short one at the latest."""
        if not isinstance(kernel, JITFunction):  # the interpreter's
            kernel = JITFunction(kernel.fn, do_not_specialize=["count", "heads", "group", "seq_len"])
        kernel[programs if isinstance(programs, tuple) else (programs, 1, 1)](*arguments, **constants)
        launch(kernel, programs, *arguments, **constants)
        ordinary = self.ordinary
        launch(kernel, programs, *arguments, **constants)
        assert self.ordinary == ordinary
        want, *ours = self.runs[-3:]
        for run in ours:
            assert run[0] is want[0], f"{run[0].key}\nis run where Triton runs\n{want[0].key}"
            # Grid, stream, function and its metadata
            assert run[1:7] == want[1:7]
            # After three places for hooks the arguments: the very tensors
            assert len(run) == len(want) == 10 + len(kernel.arg_names)
            assert all(mine is theirs or mine == theirs for mine, theirs in zip(run[10:], want[10:], strict=True))
        assert ours[-1][7:10] == (None, None, None)
        self.kernels.append(kernel.__name__)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    run = JITFunction.run
    compiled: dict[tuple[JITFunction[Any], str], Compiled] = {}

    def counted(kernel: Any, *arguments: Any, **options: Any) -> Any:
        recorder.ordinary += 1
        return run(kernel, *arguments, **options)

    def compile_nothing(kernel: Any, key: str, *_: Any) -> Compiled:
        # Not put into Triton's own cache: the kernels are those of the other tests.
        return compiled.setdefault((kernel.fn, key), Compiled(key, recorder.runs))

    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    monkeypatch.setattr(JITFunction, "run", counted)
    monkeypatch.setattr(JITFunction, "_do_compile", compile_nothing)
    monkeypatch.setattr(module, "_compiled", {})
    return recorder


def plain(a, b, strides, count, again, factor, BLOCK: tl.constexpr, KIND: tl.constexpr):
    """What is done with the arguments makes no difference here."""


def another(a, b, strides, count, again, factor, BLOCK: tl.constexpr, KIND: tl.constexpr):
    """Takes the same."""


def described(x, y, factor, BLOCK: gl.constexpr):
    """Takes descriptors."""


def usual_arguments() -> dict[str, Any]:
    buffer = torch.zeros(64)
    return {"a": buffer, "b": buffer, "strides": (64, 16, 8, 1), "count": 32, "again": 32, "factor": 0.5}


CONSTANTS: dict[str, Any] = {"BLOCK": 64, "KIND": tl.float32, "num_warps": 4}


def test_every_kind_of_argument(recorder: Recorder) -> None:
    """Each in the place of the usual one: a key that left something out would find the kernel of another kind."""
    kernel = JITFunction(plain, do_not_specialize=["again"])
    usual = usual_arguments()
    buffer = usual["a"]
    numbers = [0, 1, 2, 15, 16, 17, 2**31 - 1, 2**31 - 16, 2**31, 2**31 + 1, 2**32, 2**63, -1, -16, -(2**31) - 16]
    changes: list[dict[str, Any]] = [
        *({name: buffer[offset:]} for name in ("a", "b") for offset in range(5)),
        *({"a": torch.zeros(4, dtype=dtype)} for dtype in (torch.bfloat16, torch.float16, torch.int32, torch.int64)),
        {"a": torch.nn.Parameter(torch.zeros(4))},
        *({name: number} for name in ("count", "again") for number in numbers),
        *({"strides": (number, 16, 8, 1)} for number in numbers),
        *({"strides": (64, 16, number, 1)} for number in numbers),
        {"strides": (8, 1)},
        *({"factor": number} for number in (0.0, 1.0, 16.0, 1)),
        {"count": 1.0},
    ]
    for change in [{}, *changes, *reversed(changes)]:
        recorder.launch(kernel, 3, *(usual | change).values(), **CONSTANTS)
    recorder.launch(JITFunction(another), 3, *usual.values(), **CONSTANTS)
    for change in ({"BLOCK": 32}, {"KIND": tl.float16}, {"num_warps": 8}, {"num_stages": 2}):
        recorder.launch(kernel, 3, *usual.values(), **CONSTANTS | change)


def test_the_usual_arguments_again(recorder: Recorder) -> None:
    """Other lengths, other tensors: nothing that Triton would compile anew for, so it is not asked either."""
    kernel = JITFunction(plain, do_not_specialize=["again"])
    for length in (64, 128, 256):
        usual = usual_arguments() | {"strides": (16 * length, length, 8, 1), "count": length, "factor": 1 / length}
        launch(kernel, length, *usual.values(), **CONSTANTS)
    assert recorder.ordinary == 1 and len(recorder.runs) == 3
    launch(kernel, (4, 3, 2), *usual_arguments().values(), **CONSTANTS)
    assert [run[1:4] for run in recorder.runs] == [(64, 1, 1), (128, 1, 1), (256, 1, 1), (4, 3, 2)]


def test_descriptors(recorder: Recorder) -> None:
    kernel = GluonJITFunction(described)
    types = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}

    def descriptor(dtype: torch.dtype, block: list[int], shape: tuple[int, ...], swizzle: int | None) -> Any:
        layout = gl.NVMMASharedLayout.get_default_for(block, types[dtype])
        if swizzle is not None:
            layout = gl.NVMMASharedLayout(swizzle, layout.element_bitwidth, rank=4)
        return TensorDescriptor(torch.zeros(shape, dtype=dtype), list(shape), [*shape[:3], 1], block, layout)

    usual = descriptor(torch.bfloat16, [1, 1, 64, 64], (16, 16, 64, 64), None)
    for dtype in types:
        for block in ([1, 1, 64, 64], [1, 1, 128, 64], [1, 1, 64, 32]):
            for shape in ((16, 16, 64, 64), (16, 32, 64, 128)):
                for swizzle in (None, 32, 64):
                    other = descriptor(dtype, block, shape, swizzle)
                    recorder.launch(kernel, 3, usual, other, 0.5, BLOCK=64, num_warps=4)
                    recorder.launch(kernel, 3, other, usual, 0.5, BLOCK=64, num_warps=4)


def test_each_device_has_its_own(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = JITFunction(plain)
    arguments = usual_arguments().values()
    for device in (1000, 1001, 1000):
        monkeypatch.setattr(Driver, "device", device)
        launch(kernel, 3, *arguments, **CONSTANTS)
    assert recorder.ordinary == 2 and [run[4] for run in recorder.runs] == [7000, 7007, 7000]


def operands(
    heads: int, key_heads: int | None, seq_len: int, head_dim: int, dtype: torch.dtype, batch: int = 1
) -> Operands:
    """Of a self-relation where key_heads is None."""

    def zeros(heads: int) -> torch.Tensor:
        return torch.zeros(batch, seq_len, heads, head_dim, dtype=dtype).transpose(1, 2)

    q_s, q_t = zeros(heads), zeros(heads)
    if key_heads is None:
        return Operands(q_s, q_s, q_t, q_t, True)
    return Operands(q_s, zeros(key_heads), q_t, zeros(key_heads), False)


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("segments", [None, torch.int64, torch.int32], ids=["one", "int64", "int32"])
def test_hopper_kernels(
    segments: torch.dtype | None, deterministic: bool, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the package launches them, forward and backward, one shape after the other."""

    def checked(kernel: Any, programs: Any, *arguments: Any, **constants: Any) -> None:
        named = dict(zip(kernel.arg_names, arguments, strict=False))
        if "progress" in named:
            # Every program begins by taking one of the row tiles, which must be there from the first to the last.
            assert not named["progress"].any() and named["progress"].dtype == torch.int32
            batch, heads, tokens, _ = named["q_s"].shape
            rows = HOPPER_BLOCK * constants["PARTS"]
            assert named["items"] == batch * heads * -(-tokens // rows) and 1 <= programs <= named["items"]
            assert named["items"] % (named["together"] * named["own_tiles"]) == 0
            assert programs * named["most"] >= named["items"]
        recorder.launch(kernel, programs, *arguments, **constants)

    for backend in (hopper_backend, hopper_wide_backend, triton_backend, segment_kernels):
        monkeypatch.setattr(backend, "launch", checked)
    monkeypatch.setattr(triton_backend, "_architecture", lambda device: "sm_90")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    cases = [
        operands(2, None, seq_len, head_dim, dtype)
        for seq_len in (1, 16, 100, 128, 257)
        for head_dim in (64, 128)
        for dtype in (torch.bfloat16, torch.float16)
    ]
    cases += [operands(4, 1, 128, 96, torch.bfloat16), operands(1, 1, 1, 128, torch.float16, batch=3)]
    for each in cases:
        batch, heads, seq_len, _ = each.student_q.shape
        for offset in (0, 1):  # of ids and gradients: the others are always at a multiple of 16 bytes
            ids = None
            if segments is not None:
                ids = torch.zeros(batch * seq_len + offset, dtype=segments)[offset:].view(batch, seq_len)
            grad = torch.zeros(batch * heads * seq_len + offset)[offset:].view(batch, heads, seq_len)
            _, statistics = triton_backend.forward(each, 1.0, ids)
            triton_backend.backward(each, 1.0, ids, statistics, grad)
    of_tiles = [] if segments is None else ["tile_ranges_kernel", "tile_bounds_kernel"]
    expected = []
    for each in cases:
        # Backward takes its tiles from forward, or has larger ones, and a kernel for each gradient.
        backward = ["backward_kernel", "finish_kernel"]
        if deterministic:
            backward = [*of_tiles, *["wide_backward_kernel"] * (1 if each.self_relation else 2)]
        expected += [*of_tiles, "forward_kernel", "forward_again_kernel", *backward] * 2
    assert recorder.kernels == expected


def test_pivots_of_deterministic_mode() -> None:
    """From sums relative to the own logit, or minus the logarithm of large ones."""
    sums = torch.tensor([1.0, 3.0, -90.0, 2.0**80])
    own = torch.tensor([5.0, -1e4, 7.0, 0.0])
    pivot_s, pivot_t, inverse_s, inverse_t = triton_backend.absolute(sums, sums.flip(0), own, own.flip(0))
    assert pivot_s.tolist() == [5.0, -1e4, 97.0, 0.0]
    torch.testing.assert_close(inverse_s, torch.tensor([1.0, 1 / 3, 1.0, 2.0**-80]))
    assert torch.equal(pivot_t, pivot_s.flip(0)) and torch.equal(inverse_t, inverse_s.flip(0))


def test_what_hooks_in_is_served(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = JITFunction(plain)
    arguments = usual_arguments().values()

    def ordinary() -> bool:
        before = recorder.ordinary
        launch(kernel, 3, *arguments, **CONSTANTS)
        return recorder.ordinary > before

    def nothing(*_: Any, **__: Any) -> None:
        pass

    assert ordinary() and not ordinary()
    for name in ("launch_enter_hook", "launch_exit_hook"):
        hook = getattr(knobs.runtime, name)
        hook.add(nothing)
        assert ordinary()
        hook.remove(nothing)
        assert not ordinary()
        monkeypatch.setattr(knobs.runtime, name, nothing)
        assert ordinary()
        monkeypatch.setattr(knobs.runtime, name, None)
        assert not ordinary()
    kernel.pre_run_hooks.append(nothing)
    assert ordinary()
    kernel.pre_run_hooks.clear()
    assert not ordinary()
    for knob, name, value in (
        (knobs.runtime, "debug", True),
        (knobs.runtime, "add_stages_inspection_hook", lambda *_: ("key", "hash")),
        (knobs.compilation, "instrumentation_mode", "consan"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(knob.__dict__, name, value)
            assert ordinary()
    monkeypatch.setattr(module, "_KNOWN", False)
    assert ordinary()


def test_a_constant_among_the_arguments_is_refused(recorder: Recorder) -> None:
    """Its value would not be in the key."""
    with pytest.raises(AssertionError):
        launch(JITFunction(plain), 3, *usual_arguments().values(), 64, KIND=tl.float32)
