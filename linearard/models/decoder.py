"""The parts of a causal language model, and passes that compute only what is needed of it.

No model code is copied: for the duration of a pass modules get another `forward`. They are still called as modules, so
ZeRO's hooks see them; what is not called is neither computed nor gathered.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import nn
from transformers.modeling_outputs import MoeModelOutputWithPast

from linearard.capture import QkvTaken
from linearard.head_loss import Logits

T = TypeVar("T")
Forwards = dict[nn.Module, Callable[..., Any]]


@contextlib.contextmanager
def replaced_forwards(forwards: Forwards) -> Iterator[None]:
    """Within: these modules compute what the functions say."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward


@dataclass(frozen=True)
class Decoder:
    """The parts of a causal language model of transformers.

    Attributes:
        causal: the whole model, without PEFT around it.
        body: embeddings, layers and the last norm: what gives the last hidden states.
        layers: the decoder layers.
        head: hidden states to logits.
        logits_factor: the model's logits are this times what the head gives; None where they are something else.
    """

    causal: nn.Module
    body: nn.Module
    layers: tuple[nn.Module, ...]
    head: nn.Module
    logits_factor: float | None

    @classmethod
    def of(cls, model: nn.Module) -> Decoder:
        """The parts of a model that `models.student.load_model` gave, inside PEFT or not; before ZeRO's hooks."""
        causal: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        body, head = causal.get_decoder(), causal.get_output_embeddings()
        return cls(causal, body, tuple(getattr(body, "layers", ())), head, _logits_factor(causal, body, head))

    def attention(self, layer: int) -> nn.Module | None:
        """The attention module of a layer; None where it is not found under its usual name."""
        found = getattr(self.layers[layer], "self_attn", None) if layer < len(self.layers) else None
        return found if getattr(found, "layer_idx", None) == layer else None

    def nothing_behind(self, layer: int) -> Forwards:
        """Forwards for a pass of which only q, k, v of layers up to `layer` are needed.

        The observer must leave that layer's attention by `QkvTaken` (`capture.ending_at`). What comes behind is passed
        through; its attention is replaced by zeros that keep q, k, v in the graph.

        Returns:
            Nothing (so that everything is computed) where the layers are not built as Llama's are.
        """
        last, behind = self.layers[layer], self.layers[layer + 1 :]
        attention, mlp = self.attention(layer), getattr(last, "mlp", None)
        if attention is None or not isinstance(getattr(mlp, "down_proj", None), nn.Module):
            return {}
        skipped = [*behind, mlp, getattr(last, "post_attention_layernorm", None), getattr(self.body, "norm", None)]
        forwards: Forwards = {module: _pass_through for module in skipped if isinstance(module, nn.Module)}
        return {**forwards, attention: _until_taken(attention.forward)}

    def until_hidden(self, then: Callable[[torch.Tensor], Any]) -> Forwards:
        """A forward of `causal` that calls `body` and returns `then` of the last hidden states [B, N, E]."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = {name: value for name, value in kwargs.items() if value is not None}
            return then(self.body(*args, **given).last_hidden_state)

        return {self.causal: forward}

    def inside_head(self, run: Callable[..., T], *hidden: torch.Tensor) -> T:
        """Calls `run` with the head's function from hidden states [n, E] to logits [n, V], inside one call of the head.

        ZeRO-3 gathers the head's weights once around all of `run`, which may use the function many times.

        Args:
            run: what is computed.
            hidden: hidden states that the head's gradient hooks are to see; `run` gets them, too.
        """
        logits = self.scaled(self.head.forward)
        result: list[T] = []

        def forward(*hidden: torch.Tensor) -> Any:
            result.append(run(logits, *hidden))
            return result[0] if hidden else None

        with replaced_forwards({self.head: forward}):
            output = self.head(*hidden)
        return output if hidden else result[0]

    def scaled(self, logits: Logits) -> Logits:
        """`logits` with the model's own factor."""
        factor = self.logits_factor
        assert factor is not None
        return logits if factor == 1 else lambda hidden: logits(hidden) * factor


def _pass_through(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return hidden_states


def _until_taken(forward: Callable[..., Any]) -> Callable[..., Any]:
    """An attention module's forward that gives zeros where its observer leaves it."""

    def taken(*args: Any, **kwargs: Any) -> Any:
        hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        try:
            return forward(*args, **kwargs)
        except QkvTaken as found:
            return _Zeros.apply(hidden_states, *found.tensors), None

    return taken


class _Zeros(torch.autograd.Function):
    """Zeros shaped like hidden states; backward reaches q, k, v without a gradient."""

    @staticmethod
    def forward(ctx: Any, like: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
        return like.new_zeros(()).expand(like.shape)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        return None, None, None, None


@torch.no_grad()
def _logits_factor(causal: nn.Module, body: nn.Module, head: nn.Module) -> float | None:
    """What a model multiplies its head's output with (1 for most); None if it does anything else, such as capping."""
    known = torch.tensor([[[-64.0, -1.0, 0.5, 2.0, 128.0]]])
    stub: Forwards = {
        body: lambda *args, **kwargs: MoeModelOutputWithPast(last_hidden_state=known),  # type: ignore[arg-type]
        head: lambda hidden: hidden,
    }
    with replaced_forwards(stub):
        logits = causal.forward(input_ids=torch.zeros(1, 1, dtype=torch.int64)).logits
    factor = float(logits[0, 0, 0] / known[0, 0, 0])
    return factor if torch.allclose(logits, factor * known) else None
