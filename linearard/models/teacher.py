"""The frozen teacher: the student's own frozen weights (shared) or a second copy (replica), native RoPE."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from linearard import profiling
from linearard.capture import AttentionPass, ending_at
from linearard.head_loss import Logits
from linearard.layout import MicroBatch
from linearard.models.decoder import Decoder, Forwards, replaced_forwards
from linearard.models.rope import RopeSwitch
from linearard.models.student import adapters_disabled
from linearard.teacher_tensors import TeacherTensors

T = TypeVar("T")


class Teacher:
    """Runs the teacher's forward pass on a micro-batch's windows: before the student's, or in lockstep with it."""

    def __init__(self, module: nn.Module, decoder: Decoder, ulysses: Any, shared_rope: RopeSwitch | None) -> None:
        """
        Args:
            module: what is called: the replica's module; the student's body (shared), because DeepSpeed takes a call
                of its root for the start of a new step and would lose the order of modules that it prefetches by.
            decoder: the parts of the model that `module` belongs to.
            ulysses: sequence parallelism for windows that span shards; None at size 1.
            shared_rope: the student's RoPE switch where the module is the student's, None for a replica.
        """
        self._module = module
        self._ulysses = ulysses
        self._rope = shared_rope
        self.decoder = decoder
        self._head_forward = decoder.head.forward

    @contextlib.contextmanager
    def acting(self, module: nn.Module) -> Iterator[None]:
        """Within: `module`, a part of the model, is the teacher's: adapters off, no dropout, no checkpointing."""
        was_training = module.training
        with adapters_disabled(module) if self._rope is not None else contextlib.nullcontext():
            module.eval()
            try:
                yield
            finally:
                module.train(was_training)

    @torch.no_grad()
    def forward(self, batch: MicroBatch, tensors: TeacherTensors, last_layer: int | None) -> torch.Tensor | None:
        """Runs the pass; `tensors` gets what the relations need of each layer.

        Args:
            batch: the micro-batch.
            tensors: filled here, for the student's backward pass.
            last_layer: nothing is computed behind this layer's q, k, v; None: the whole pass.

        Returns:
            The last hidden states [B, N, E] of a whole pass, else None.
        """
        inputs, forwards = self._prepare(batch, tensors, last_layer)
        hidden: list[torch.Tensor] = []
        if self._module is not self.decoder.body:
            forwards |= self.decoder.until_hidden(hidden.append)
        with contextlib.ExitStack() as stack:
            if self._rope is not None:
                stack.enter_context(self._rope.native())
            stack.enter_context(self.acting(self._module))
            stack.enter_context(replaced_forwards(forwards))
            output = self._module(**inputs)
        if last_layer is not None:
            return None
        last = hidden[0] if hidden else output.last_hidden_state
        return last.reshape(*batch.input_ids.shape, -1)

    def can_lead(self, last_layer: int) -> bool:
        """Whether `leading` is possible: the model is the student's, its layers are built as Llama's are."""
        return self._rope is not None and bool(self.decoder.nothing_behind(last_layer))

    def leading(self, batch: MicroBatch, tensors: TeacherTensors, last_layer: int) -> Forwards:
        """Forwards for the student's forward pass in which the teacher goes first, layer by layer.

        A layer's weights serve both at one time: ZeRO-3 keeps what is needed again within stage3_max_reuse_distance,
        and gathers it once. They are not for the backward pass: a layer that checkpointing computes again is the
        student's alone.

        Args:
            batch: the micro-batch.
            tensors: filled while the student's pass runs, for its backward pass.
            last_layer: the teacher's pass ends with this layer's q, k, v.
        """
        inputs, forwards = self._prepare(batch, tensors, last_layer)
        own = {module: module.forward for module in (self.decoder.body, *self.decoder.layers[: last_layer + 1])}
        steps = self._steps(inputs, forwards, own)

        def both(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            with torch.no_grad(), profiling.part("teacher"):
                done = next(steps)
            assert done is module, "the model calls its layers in another order"
            return own[module](*args, **kwargs)

        return {module: partial(both, module) for module in own}

    def _steps(self, inputs: dict[str, Any], forwards: Forwards, own: Forwards) -> Iterator[nn.Module]:
        """The teacher's pass in steps: first what its body does around the layers, then each layer.

        Args:
            inputs: what the body is called with.
            forwards: of modules inside the layers and behind the last one.
            own: the plain forwards of the body and of the layers, in this order.

        Yields:
            The module whose step is done.
        """
        assert self._rope is not None
        body, *layers = own
        hidden = torch.empty(0)  # the body's own, once it has called its layers
        given: dict[nn.Module, tuple[Any, Any]] = {}  # what else it calls each of them with

        def keep(layer: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            nonlocal hidden
            hidden, given[layer] = hidden_states, (args, kwargs)
            return hidden_states

        kept: Forwards = {layer: partial(keep, layer) for layer in layers}
        with self._rope.native(), self.acting(body), replaced_forwards({**forwards, **kept}):
            own[body](**inputs)
        yield body
        for layer in layers:
            args, kwargs = given.pop(layer)
            inside = {module: forwards[module] for module in layer.modules() if module in forwards}
            with self.acting(layer), replaced_forwards(inside):
                hidden = own[layer](hidden, *args, **kwargs)
            yield layer

    def _prepare(
        self, batch: MicroBatch, tensors: TeacherTensors, last_layer: int | None
    ) -> tuple[dict[str, Any], Forwards]:
        """What the model is called with, and the forwards of its parts; `tensors` are begun anew."""
        tensors.begin(batch.teacher_input_ids.shape[0] // batch.input_ids.shape[0])
        attention_pass = AttentionPass(
            segments=batch.teacher_segments,
            ulysses=None if batch.local_windows else self._ulysses,
            observer=tensors.observe,
            observe_shards=batch.observe_shards,
        )
        forwards: Forwards = {} if last_layer is None else self.decoder.nothing_behind(last_layer)
        if last_layer is not None and forwards:
            attention_pass = replace(attention_pass, observer=ending_at(tensors.observe, last_layer))
        for layer in tensors.wanted:
            attention = self.decoder.attention(layer)
            if attention is not None:
                forward = forwards.get(attention, attention.forward)
                forwards[attention] = tensors.attention(layer, attention, forward)
        inputs = {
            "input_ids": batch.teacher_input_ids,
            "position_ids": batch.teacher_position_ids,
            "use_cache": False,
            "attention_pass": attention_pass,
        }
        return inputs, forwards

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [n, V] of last hidden states [n, E].

        A replica's head is called as a module: ZeRO-3 gathers its weights each time. A shared one is the student's:
        this must be called inside the student's own head.
        """
        if self._rope is None:
            return self.decoder.scaled(self.decoder.head)(hidden)
        with adapters_disabled(self.decoder.head):
            return self.decoder.scaled(self._head_forward)(hidden)

    def inside_head(self, run: Callable[[Logits], T]) -> T:
        """Calls `run` with `logits`, the weights gathered once around all of it."""
        return self.decoder.inside_head(run) if self._rope is None else run(self.logits)
