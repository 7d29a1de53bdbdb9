"""The attention function of student and teacher: documents kept apart, Ulysses around it, q/k/v observed.

It is registered with transformers under one name. What a particular forward pass needs travels as a keyword argument
of the model's forward, `attention_pass`, which every model that goes through AttentionInterface hands on to it: there
is no global state, and teacher, student and evaluation may differ in everything but weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from linearard.errors import UserError
from linearard.layout import Segments

ATTENTION = "linearard"  # attn_implementation

# (layer, query [B, H, T, D], key and value [B, Hkv, T, D], scaling) -> the same three tensors, or what replaces them
Observer = Callable[
    [int, torch.Tensor, torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor, torch.Tensor]
]


class QkvTaken(Exception):
    """Leaves an attention module from inside its attention function, once its q, k, v are all that was wanted."""

    def __init__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        super().__init__()
        self.tensors = query, key, value


def ending_at(observer: Observer, layer: int) -> Observer:
    """`observer`, which leaves the attention module of `layer` by `QkvTaken` with what it has replaced q, k, v by."""

    def observe(
        number: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query, key, value = observer(number, query, key, value, scaling)
        if number == layer:
            raise QkvTaken(query, key, value)
        return query, key, value

    return observe


@dataclass(frozen=True)
class AttentionPass:
    """What one forward pass asks of attention.

    Attributes:
        segments: of what attention sees: the whole sequence where `ulysses` is given.
        ulysses: sequence parallelism around the attention, or None: this rank holds whole sequences.
        observer: sees the tensors of each layer.
        observe_shards: the observer sees q, k, v before the all-to-all (shards of all heads), not after it.
    """

    segments: Segments
    ulysses: Callable[..., Any] | None = None
    observer: Observer | None = None
    observe_shards: bool = True


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    attention_pass: AttentionPass | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What transformers calls: q [B, H, N, D], k and v [B, Hkv, N, D] to [B, N, H, D] (or [B, N, H * D])."""
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise UserError("model.path: attention with soft-capped logits or sinks is not supported")
    if attention_pass is None:
        raise UserError("model.path: the model does not hand its keyword arguments on to attention; use another one")
    if dropout:
        raise UserError("model.path: attention_dropout must be 0 in the model's config.json")
    scale: float = query.shape[-1] ** -0.5 if scaling is None else scaling
    observer, layer = attention_pass.observer, int(getattr(module, "layer_idx"))  # noqa: B009
    if observer is not None and attention_pass.observe_shards:
        query, key, value = observer(layer, query, key, value, scale)
        observer = None
    if attention_pass.ulysses is None:
        return attention_core(
            module, query, key, value, None, segments=attention_pass.segments, observer=observer, scaling=scale
        )
    return attention_pass.ulysses(
        module,
        query,
        key,
        value,
        None,
        segments=attention_pass.segments,
        observer=observer,
        scaling=scale,
        position_ids=kwargs["position_ids"],
    )


def attention_core(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    segments: Segments,
    observer: Observer | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention on whole sequences: what Ulysses calls after the all-to-all. Returns [B, T, H, D]."""
    if observer is not None:
        query, key, value = observer(int(getattr(module, "layer_idx")), query, key, value, scaling)  # noqa: B009
    return segment_attention(query, key, value, segments, scaling), None


def segment_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scaling: float
) -> torch.Tensor:
    """Causal attention inside each segment; no n x n mask, work falls with the square of the segments' length.

    Args:
        query: [B, H, T, D].
        key, value: [B, Hkv, T, D], H % Hkv == 0.
        segments: of [B, T].
        scaling: factor of the logits.

    Returns:
        [B, T, H, D].
    """
    batch, heads, length, dim = query.shape
    if (segments.batch_size, segments.length) != (batch, length):
        raise ValueError(f"segments are of [{segments.batch_size}, {segments.length}], query of [{batch}, {length}]")
    run = segments.uniform_length
    if run == length:
        return _sdpa(query, key, value, scaling).transpose(1, 2)
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        packed = [x.transpose(1, 2).reshape(batch * length, x.shape[1], dim) for x in (query, key, value)]
        out = _varlen(packed[0], packed[1], packed[2], segments, scaling)
        return out.view(batch, length, heads, dim)
    if run is not None:  # windows: a batch of them

        def windows(x: torch.Tensor) -> torch.Tensor:
            return x.reshape(batch, x.shape[1], length // run, run, dim).transpose(1, 2).flatten(0, 1)

        out = _sdpa(windows(query), windows(key), windows(value), scaling)
        return out.view(batch, length // run, heads, run, dim).permute(0, 1, 3, 2, 4).reshape(batch, length, heads, dim)
    rows: list[list[torch.Tensor]] = [[] for _ in range(batch)]
    for start, end in zip(segments.cu_seqlens, segments.cu_seqlens[1:], strict=False):
        row, first = divmod(start, length)
        part = slice(first, first + end - start)
        out = _sdpa(query[row : row + 1, :, part], key[row : row + 1, :, part], value[row : row + 1, :, part], scaling)
        rows[row].append(out.transpose(1, 2))
    return torch.cat([torch.cat(parts, dim=1) for parts in rows])


def _sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and not query.is_cuda:
        # On a CPU enable_gqa takes the path that builds the n x n matrix.
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        groups = 1
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=groups > 1)


def _varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scaling: float
) -> torch.Tensor:
    """FlashAttention over packed tokens [B * T, H, D]: flash-attn where installed, else PyTorch's own."""
    borders, longest = segments.device_cu_seqlens, segments.max_length
    if flash_attn_varlen_func is not None:
        return flash_attn_varlen_func(
            query, key, value, borders, borders, longest, longest, softmax_scale=scaling, causal=True
        )
    from torch.nn.attention.varlen import varlen_attn

    # Versions before `window_size` spell it `is_causal`.
    windowed = "window_size" in inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if windowed else {"is_causal": True}
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    out: Any = varlen_attn(query, key, value, borders, borders, longest, longest, scale=scaling, **causal)
    return out


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Segments travel with the pass; a mask would be n x n."""


try:
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]
except ImportError:
    flash_attn_varlen_func = None

AttentionInterface.register(ATTENTION, attention_forward)
AttentionMaskInterface.register(ATTENTION, _no_mask)
