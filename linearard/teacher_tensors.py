"""The teacher's q, k, v between its forward pass and the student's backward pass: kept, recomputed or offloaded.

The student's backward pass takes each layer's tensors once, the last layer's first; what was taken is dropped.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from linearard.capture import AttentionPass, QkvTaken

LayerTensors = dict[str, torch.Tensor]  # "q", "k", "v" -> [B, H or Hkv, T, D]
Forward = Callable[..., Any]


class TeacherTensors:
    """`teacher.tensors: keep`: q, k, v of the layers and relations that the loss uses stay where they are."""

    def __init__(self, relations: dict[str, float], layers: tuple[int, ...]) -> None:
        self._names = sorted({letter for name in relations for letter in name})
        self.wanted = frozenset(layers) if relations else frozenset()
        self._windows = 1
        self._kept: dict[int, Any] = {}

    def begin(self, windows_per_row: int = 1) -> None:
        """Before each teacher pass.

        Args:
            windows_per_row: how many consecutive rows of the teacher's batch make one row of the student's.
        """
        self._windows = windows_per_row
        self._kept.clear()

    def observe(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The `capture.Observer` of the teacher's forward pass."""
        if layer in self.wanted:
            self._keep(layer, self._tensors(query, key, value))
        return query, key, value

    def attention(self, layer: int, module: nn.Module, forward: Forward) -> Forward:
        """What is called as the forward of a layer's attention module in the teacher's pass; as a rule `forward`."""
        return forward

    def prefetch(self) -> None:
        """Before the student's backward pass: whatever makes the first `take` quick."""

    def take(self, layer: int) -> LayerTensors:
        """The layer's tensors [B, H or Hkv, T, D]; they are forgotten here."""
        return self._kept.pop(layer)

    @property
    def held(self) -> tuple[int, ...]:
        """Layers that were not taken yet."""
        return tuple(sorted(self._kept))

    def _keep(self, layer: int, tensors: LayerTensors) -> None:
        self._kept[layer] = tensors

    def _tensors(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> LayerTensors:
        tensors = {"q": query, "k": key, "v": value}
        return {name: self._join(tensors[name].detach()) for name in self._names}

    def _join(self, x: torch.Tensor) -> torch.Tensor:
        """[B * n, H, W, D] -> [B, H, n * W, D]; no copy where heads are inner to tokens in memory."""
        if self._windows == 1:
            return x
        rows, heads, window, dim = x.shape
        x = x.view(rows // self._windows, self._windows, heads, window, dim).transpose(1, 2)
        return x.reshape(rows // self._windows, heads, self._windows * window, dim)


class RecomputedTensors(TeacherTensors):
    """`teacher.tensors: recompute`: only the input of each attention module is kept; q, k, v are computed again.

    The attention module's forward runs once more, outside its own `__call__` so that ZeRO-3's hooks of that module
    are not left half done, and is left as soon as q, k, v are there. Its projections are called as modules: ZeRO-3
    gathers them, in the same order on all ranks.
    """

    def __init__(
        self,
        relations: dict[str, float],
        layers: tuple[int, ...],
        as_teacher: Callable[[nn.Module], contextlib.AbstractContextManager[None]],
    ) -> None:
        """as_teacher: within, a module of the model is the teacher's: adapters off, evaluation mode."""
        super().__init__(relations, layers)
        self._as_teacher = as_teacher

    def observe(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Nothing is kept of q, k, v."""
        return query, key, value

    def attention(self, layer: int, module: nn.Module, forward: Forward) -> Forward:
        """`forward`, with its arguments kept."""
        if layer not in self.wanted:
            return forward

        def kept(*args: Any, **kwargs: Any) -> Any:
            self._kept[layer] = (module, forward, args, kwargs)
            return forward(*args, **kwargs)

        return kept

    @torch.no_grad()
    def take(self, layer: int) -> LayerTensors:
        module, forward, args, kwargs = self._kept.pop(layer)
        taken: list[LayerTensors] = []

        def observe(_: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> Any:
            taken.append(self._tensors(query, key, value))
            raise QkvTaken(query, key, value)

        attention_pass: AttentionPass = replace(kwargs["attention_pass"], observer=observe)
        with self._as_teacher(module), contextlib.suppress(QkvTaken):
            forward(*args, **{**kwargs, "attention_pass": attention_pass})
        return taken.pop()


class OffloadedTensors(TeacherTensors):
    """`teacher.tensors: offload`: q, k, v go to (pinned) host memory and come back one layer ahead of their use.

    On a GPU the copies have a stream of their own. Memory of the device is allocated and dropped on the computing
    stream only, which waits for a copy before what it reads is dropped: so the allocator reuses it in order, at most
    two layers are on their way however far the host runs ahead, and the host waits for nothing. Host memory is
    allocated once and used in every pass.
    """

    def __init__(self, relations: dict[str, float], layers: tuple[int, ...], device: torch.device) -> None:
        super().__init__(relations, layers)
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pinned: dict[int, LayerTensors] = {}
        self._leaving: deque[tuple[torch.cuda.Event, LayerTensors]] = deque()
        self._arriving: dict[int, tuple[LayerTensors, torch.cuda.Event | None]] = {}

    def begin(self, windows_per_row: int = 1) -> None:
        super().begin(windows_per_row)
        if self._stream is not None:  # something is on its way here only after a step that failed
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._arriving.clear()
        self._leaving.clear()

    def prefetch(self) -> None:
        """Starts the copy of the last layer's tensors to the device."""
        self._let_go(0)
        if self._kept:
            self._fetch(max(self._kept))

    def take(self, layer: int) -> LayerTensors:
        if layer not in self._arriving:
            self._fetch(layer)
        tensors, arrived = self._arriving.pop(layer)
        if arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(arrived)
        self.prefetch()
        return tensors

    @property
    def held(self) -> tuple[int, ...]:
        return tuple(sorted((*self._kept, *self._arriving)))

    def _keep(self, layer: int, tensors: LayerTensors) -> None:
        stream = self._stream
        if stream is None:
            self._kept[layer] = {name: torch.empty_like(x, device="cpu").copy_(x) for name, x in tensors.items()}
            return
        self._let_go(1)
        host = self._pinned.setdefault(layer, {})
        for name, x in tensors.items():
            if name not in host or host[name].shape != x.shape:
                host[name] = torch.empty_like(x, device="cpu", pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for name, x in tensors.items():
                host[name].copy_(x, non_blocking=True)
        self._leaving.append((_reached(stream), tensors))
        self._kept[layer] = host

    def _let_go(self, layers: int) -> None:
        """Drops what has left for the host, but for the newest so many layers."""
        while len(self._leaving) > layers:
            left, tensors = self._leaving.popleft()
            torch.cuda.current_stream(self._device).wait_event(left)
            del tensors

    def _fetch(self, layer: int) -> None:
        host, stream = self._kept.pop(layer), self._stream
        if stream is None:
            self._arriving[layer] = {name: x.to(self._device) for name, x in host.items()}, None
            return
        tensors = {name: torch.empty_like(x, device=self._device) for name, x in host.items()}
        stream.wait_stream(torch.cuda.current_stream(self._device))  # whatever this memory was used for
        with torch.cuda.stream(stream):  # after its own copies to the host
            for name, x in tensors.items():
                x.copy_(host[name], non_blocking=True)
        self._arriving[layer] = tensors, _reached(stream)


def _reached(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """An event of the stream's work so far."""
    event = torch.cuda.Event()
    event.record(stream)
    return event
