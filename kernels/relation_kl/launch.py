"""Launches kernels with less of the host's time than Triton's own `kernel[grid](...)`, which a short kernel waits for.

Triton binds the arguments anew at each launch, writes the types of TMA descriptors out as text to tell them apart, and
compares the globals that the kernel uses with what they were. Here a short key says which compiled kernel Triton would
pick, and that one is run as `JITFunction.run` runs it at its end. The first launch of each key is Triton's own, and so
is every launch where something is to hook in, or where Triton is of a version that this was not written for.

Measured with Triton 3.6.0 and a driver that does nothing, on a CPU of the kind that takes 80 us for torch's part of a
forward and backward: the Hopper forward kernel takes 18 us of the host in the place of 40, `forward_again_kernel` 12
in the place of 22.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

# Other versions, and AMD's backend, may tell arguments apart by more than `_kind` does, or run a kernel otherwise.
_KNOWN = torch.version.hip is None and tuple(triton.__version__.split(".")[:2]) in (("3", "6"), ("3", "7"))
if _KNOWN:
    from triton import knobs

# Key -> the compiled kernel, and the constexprs, which have their places among the arguments.
_compiled: dict[Any, tuple[CompiledKernel, tuple[Any, ...]]] = {}


def launch(kernel: Any, programs: int | tuple[int, int, int], /, *arguments: Any, **constants: Any) -> None:
    """As `kernel[grid](*arguments, **constants)`, on the current device and stream.

    Args:
        kernel: from `triton.jit` or `gluon.jit`.
        programs: the size of a one-dimensional grid, or those of all three dimensions.
        arguments: all that are no constexprs, which come after them: tensors, TMA descriptors, numbers, and tuples of
            integers.
        constants: the constexprs, and the compiler's options; hashable.
    """
    grid = (programs, 1, 1) if isinstance(programs, int) else programs
    if not _nothing_hooks_in(kernel):
        kernel[grid](*arguments, **constants)
        return
    active: Any = driver.active
    device = active.get_current_device()
    key = kernel.fn, device, *constants.items(), *map(_kind, arguments)
    found = _compiled.get(key)
    if found is None:
        compiled = kernel[grid](*arguments, **constants)
        # There is none where a test stands in for the compiler.
        if isinstance(compiled, CompiledKernel):
            first, last = kernel.params[: len(arguments)], kernel.params[len(arguments) :]
            assert not any(parameter.is_constexpr for parameter in first), kernel
            _compiled[key] = compiled, tuple(constants[parameter.name] for parameter in last)
        return
    compiled, constexprs = found
    stream = active.get_current_stream(device)
    hooks = None, None, None
    run: Any = compiled.run
    run(*grid, stream, compiled.function, compiled.packed_metadata, *hooks, *arguments, *constexprs)


def _nothing_hooks_in(kernel: Any) -> bool:
    """Whether Triton's own launch would do no more than run the compiled kernel."""
    return (
        _KNOWN
        # Otherwise it is for Triton's interpreter.
        and isinstance(kernel, JITFunction)
        and not kernel.pre_run_hooks
        and not knobs.runtime.debug
        and not knobs.compilation.instrumentation_mode
        and knobs.runtime.add_stages_inspection_hook is None
        and _is_empty(knobs.runtime.launch_enter_hook)
        and _is_empty(knobs.runtime.launch_exit_hook)
        and not torch.compiler.is_compiling()
    )


def _is_empty(hook: Any) -> bool:
    return hook is None or (isinstance(hook, knobs.HookChain) and not hook.calls)


def _kind(argument: Any) -> Any:
    """All that Triton can tell arguments apart by when it compiles, whether or not it may for this parameter."""
    kind = type(argument)
    if kind is Tensor or isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if kind is int:
        # 1 becomes a constant, multiples of 16 are known as such, and what is beyond 32 bits has a type of its own.
        return argument == 1, argument % 16 == 0, argument >> 31
    if kind is float:
        return kind
    if kind is tuple:
        return _kinds(argument)
    # A TMA descriptor, which is passed by value: where its tensor lies makes no difference.
    return argument.base.dtype, *argument.block_shape, argument.layout


@lru_cache(maxsize=1024)
def _kinds(integers: tuple[int, ...]) -> tuple[Any, ...]:
    return tuple(map(_kind, integers))
