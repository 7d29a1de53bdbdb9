"""The relation terms of the loss: sums, divided once by the globally counted rows.

They never become part of a graph that spans layers. A layer's attention passes its q, k, v through the observer, an
identity whose backward computes that layer's KL, value and gradient at once, and adds the gradient to those of q, k
and v. Under gradient checkpointing only one layer's q, k, v is alive at that time, and
the KL is computed once although the layer's forward runs twice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from relation_kl import attention_kl_value_and_grad, relation_kl_value_and_grad

from linearard import profiling
from linearard.teacher_tensors import LayerTensors, TeacherTensors


class RelationLoss:
    """The relation terms of one optimizer step on this rank.

    sum over relations r:  w_r / (layers * H_r * rows) * sum of KL_i over layers, heads and rows,
    KL_i = sum_j Pt_ij (log Pt_ij - log Ps_ij) in nats (arXiv 2604.00004; DESIGN of relation_kl).
    """

    def __init__(
        self,
        weights: dict[str, float],
        layers: tuple[int, ...],
        num_attention_heads: int,
        num_key_value_heads: int,
        key_value_row_share: tuple[int, int] | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """
        Args:
            weights: relation ("qq", "kk", "vv", "qk") -> weight above 0.
            layers: layer numbers.
            num_attention_heads: H of the whole model, the heads of qq and qk.
            num_key_value_heads: Hkv of the whole model, the heads of kk and vv.
            key_value_row_share: (index, count) where `count` ranks hold replicas of the same key-value head: they
                divide the rows of kk and vv, and whoever made the replicas adds up their gradients.
            group: the ranks over which the observed tensors are sharded along the sequence; None: they are whole,
                or windows that need no other rank.
        """
        self._group = group
        self.weights = weights
        self.layers = layers
        self._heads = {name: num_attention_heads if "q" in name else num_key_value_heads for name in weights}
        self.key_value_row_share = key_value_row_share
        self.reset()

    def reset(self) -> None:
        """Forgets the sums; call once per optimizer step."""
        self.sums: dict[tuple[int, str], torch.Tensor] = {}

    def observer(
        self, teacher: TeacherTensors, segment_ids: torch.Tensor, rows: int, gradient_scale: float
    ) -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """The `capture.Observer` of one student forward pass.

        Args:
            teacher: gives q, k, v of the same tokens and heads; each layer's are taken once, in backward.
            segment_ids: int32 [B, T], negative for padding.
            rows: valid rows of one head over all ranks and accumulation steps.
            gradient_scale: factor of the gradient, for what the optimizer's reduction divides by.
        """

        def observe(
            layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            if layer not in teacher.wanted or not torch.is_grad_enabled():
                return query, key, value

            def value_and_grad(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, torch.Tensor]:
                student, theirs = {"q": q, "k": k, "v": v}, teacher.take(layer)
                with profiling.part("relation KL"):
                    return self._layer(layer, student, theirs, segment_ids, scaling, factor)

            factor = gradient_scale / (len(self.layers) * max(rows, 1))
            return _AddRelationGradient.apply(query, key, value, value_and_grad)  # type: ignore[return-value]

        return observe

    def _layer(
        self,
        layer: int,
        student: LayerTensors,
        teacher: LayerTensors,
        segment_ids: torch.Tensor,
        scaling: float,
        factor: float,
    ) -> dict[str, torch.Tensor]:
        """Adds this layer's sums; returns the gradient of q, k, v where there is one."""
        gradients: dict[str, torch.Tensor] = {}

        def add(letter: str, gradient: torch.Tensor) -> None:
            gradients[letter] = gradients[letter] + gradient if letter in gradients else gradient

        batch, heads, length, _ = student["q"].shape
        for name, weight in self.weights.items():
            count = heads if "q" in name else student["k"].shape[1]
            upstream = torch.full((), factor * weight / self._heads[name], device=segment_ids.device)
            upstream = upstream.expand(batch, count, length)
            if name == "qk":
                rows, of_query, of_key = attention_kl_value_and_grad(
                    student["q"],
                    student["k"],
                    teacher["q"],
                    teacher["k"],
                    upstream,
                    softmax_scale=scaling,
                    segment_ids=segment_ids,
                    group=self._group,
                )
                add("q", of_query)
                add("k", of_key)
            else:
                letter = name[0]
                rows, gradient = relation_kl_value_and_grad(
                    student[letter],
                    teacher[letter],
                    upstream,
                    softmax_scale=scaling,
                    segment_ids=segment_ids,
                    group=self._group,
                    row_share=None if letter == "q" else self.key_value_row_share,
                )
                add(letter, gradient)
            total = rows.sum(dtype=torch.float64)
            key = (layer, name)
            self.sums[key] = self.sums[key] + total if key in self.sums else total
        return gradients

    def means(self, sums: torch.Tensor, rows: int) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Mean KL of each relation, and of each layer, from sums [relations, layers] reduced over all ranks."""
        per_layer = {
            name: (sums[i] / (self._heads[name] * max(rows, 1))).tolist() for i, name in enumerate(self.weights)
        }
        return {name: sum(values) / len(values) for name, values in per_layer.items()}, per_layer

    def stacked_sums(self, device: torch.device) -> torch.Tensor:
        """This rank's sums, fp64 [relations, layers]; zeros before the backward pass."""
        table = torch.zeros(len(self.weights), len(self.layers), dtype=torch.float64, device=device)
        for i, name in enumerate(self.weights):
            for j, layer in enumerate(self.layers):
                if (layer, name) in self.sums:
                    table[i, j] = self.sums[layer, name]
        return table


class _AddRelationGradient(torch.autograd.Function):
    """Identity on q, k, v; backward adds the gradient of a loss that is computed there."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, value_and_grad: Any) -> Any:
        ctx.set_materialize_grads(False)  # nothing comes from behind where attention is not computed
        ctx.save_for_backward(query, key, value)
        ctx.value_and_grad = value_and_grad
        return query.view_as(query), key.view_as(key), value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor | None) -> Any:
        tensors = dict(zip("qkv", ctx.saved_tensors, strict=True))
        gradients = ctx.value_and_grad(*tensors.values())
        ctx.value_and_grad = None
        totals: list[torch.Tensor] = []
        for (name, x), grad in zip(tensors.items(), upstream, strict=True):
            own = gradients.pop(name, None)
            if grad is None:  # zeros where there is neither: DeepSpeed's hooks of the projection expect a gradient
                totals.append(x.new_zeros(()).expand_as(x) if own is None else own)
            else:
                totals.append(grad if own is None else grad + own)
        return *totals, None


def per_layer_table(layers: tuple[int, ...], per_layer: dict[str, list[float]]) -> dict[str, dict[int, float]]:
    """Per-layer means keyed by layer number, for metrics.jsonl."""
    table: dict[str, dict[int, float]] = defaultdict(dict)
    for name, values in per_layer.items():
        table[name] = dict(zip(layers, values, strict=True))
    return dict(table)
