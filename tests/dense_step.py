"""A training step in float64 by autograd over dense matrices, for tests of the engine.

Plain transformers with a dense attention function of this file: it shares with the trainer the weights, the batch and
Hugging Face's RoPE configuration, nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from distributed import NATIVE, SEQ_LEN
from torch import nn


def _pieces(segment_ids: torch.Tensor, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of the pieces that documents and windows share (-1: padding), and positions in them; token by token."""
    ids, positions = torch.full_like(segment_ids, -1), torch.zeros_like(segment_ids)
    for row in range(len(segment_ids)):
        piece = position = -1
        for i in range(segment_ids.shape[1]):
            if i == 0 or segment_ids[row, i] != segment_ids[row, i - 1] or i % window == 0:
                piece, position = piece + 1, -1
            position += 1
            positions[row, i] = position
            if segment_ids[row, i] >= 0:
                ids[row, i] = piece
    return ids, positions


def _visible(ids: torch.Tensor) -> torch.Tensor:
    """[B, T, T]: a row sees keys of its own id at or before it; padding sees itself."""
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    same = (ids[:, :, None] == ids[:, None, :]) & (ids[:, :, None] >= 0)
    return causal & same | torch.eye(ids.shape[1], dtype=torch.bool)


class _Dense:
    """Attention over explicit matrices; keeps the q, k, v of each layer and the scale of the logits."""

    def __init__(self) -> None:
        self.visible = torch.ones(0)
        self.layers: dict[int, tuple[torch.Tensor, ...]] = {}
        self.scales: set[float] = set()

    def __call__(self, module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **kwargs: Any) -> Any:
        self.layers[module.layer_idx] = (q, k, v)
        self.scales.add(scaling)
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = (q @ k.transpose(-1, -2) * scaling).masked_fill(~self.visible[:, None], float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2), None

    def run(self, model: nn.Module, weights: dict[str, torch.Tensor], visible: torch.Tensor, **inputs: Any) -> Any:
        """Logits and the tensors of each layer."""
        self.visible, self.layers = visible, {}
        output = torch.func.functional_call(model, weights, kwargs={**inputs, "use_cache": False})
        return output.logits, self.layers


def _kl_rows(student: tuple[Any, Any], teacher: tuple[Any, Any], scale: float, visible: torch.Tensor) -> torch.Tensor:
    """KL of each row, [B, H, T]; each side (x, y) gives the logits scale * x y^T."""

    def log_p(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        y = y.repeat_interleave(x.shape[1] // y.shape[1], 1)
        return (scale * x @ y.transpose(-1, -2)).masked_fill(~visible[:, None], float("-inf")).log_softmax(-1)

    ours, theirs = log_p(*student), log_p(*teacher)
    terms = theirs.exp() * (theirs - ours)
    return torch.where(visible[:, None], terms, 0.0).sum(-1)


def dense_step(
    raw: dict[str, Any], model: Path, trained: dict[str, torch.Tensor], data: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Loss, terms and gradients of one step.

    Args:
        raw: the run's configuration, as plain dictionaries.
        model: folder of the base.
        trained: the trained weights that the step starts from, by the engine's names.
        data: a batch [B, T] on the host (`distributed.batch`).
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    dense = _Dense()
    AttentionInterface.register("dense_of_the_test", dense)
    AttentionMaskInterface.register("dense_of_the_test", lambda *args, **kwargs: None)
    settings, objective = raw["model"], raw["objective"]
    native = AutoConfig.from_pretrained(model)
    stretched = AutoConfig.from_pretrained(model)
    stretched.rope_parameters = {"rope_theta": 100.0, **settings["rope_parameters"]}
    if settings["rope_parameters"]["rope_type"] in ("yarn", "llama3"):
        stretched.rope_parameters["original_max_position_embeddings"] = NATIVE
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(
            model, config=config, dtype=torch.float64, attn_implementation="dense_of_the_test"
        ).requires_grad_(False)
        for config in (stretched, native)
    )
    leaves = {name: value.double().requires_grad_() for name, value in trained.items()}
    weights = dict(leaves)
    if settings["trainable"] == "lora":
        factor = settings["lora"]["alpha"] / settings["lora"]["r"]
        base, weights = dict(student.named_parameters()), {}
        for name, a in leaves.items():
            if ".lora_A." in name:
                b = leaves[name.replace(".lora_A.", ".lora_B.")]
                plain = name.removeprefix("base_model.model.").replace(".lora_A.default", "")
                weights[plain] = base[plain] + factor * (b @ a)
        assert 2 * len(weights) == len(leaves)

    documents, labels = data["segment_ids"], data["labels"]
    window = raw["teacher"].get("window", NATIVE)
    pieces, positions = _pieces(documents, SEQ_LEN if window == "full" else window)
    rows = pieces >= 0
    count = {"relations": int(rows.sum()), "labels": int((labels >= 0).sum())}
    ids = data["input_ids"]
    logits, ours = dense.run(student, weights, _visible(documents), input_ids=ids, position_ids=data["position_ids"])
    with torch.no_grad():
        of_teacher, theirs = dense.run(teacher, {}, _visible(pieces), input_ids=ids, position_ids=positions)
    (scale,) = dense.scales
    chosen = objective.get("layers", "all")
    chosen = {"all": sorted(ours), "last": [max(ours)]}[chosen] if isinstance(chosen, str) else chosen
    per_layer: dict[str, list[torch.Tensor]] = {}
    for name, weight in objective["relations"].items():
        if not weight:
            continue
        x, y = ("qkv".index(letter) for letter in name)
        for layer in chosen:
            student_side, teacher_side = (side[layer] for side in (ours, theirs))
            value = _kl_rows(
                (student_side[x], student_side[y]), (teacher_side[x], teacher_side[y]), scale, _visible(pieces)
            )
            heads = value.shape[1]
            mean = torch.where(rows[:, None], value, 0.0).sum() / (heads * count["relations"])
            per_layer.setdefault(name, []).append(mean)
    loss = sum(
        (objective["relations"][name] * sum(values) / len(values) for name, values in per_layer.items()),
        torch.zeros((), dtype=torch.float64),
    )
    log_p = logits.log_softmax(-1)
    next_token = F.nll_loss(log_p.flatten(0, 1), labels.flatten(), ignore_index=-100)
    theirs_log = of_teacher.log_softmax(-1)
    kl = ((theirs_log.exp() * (theirs_log - log_p)).sum(-1) * (labels >= 0)).sum() / count["labels"]
    loss = loss + objective["next_token"] * next_token + objective["logits_kl"] * kl
    gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True), strict=True))
    return {
        "loss": loss.item(),
        "per_layer": {name: [value.item() for value in values] for name, values in per_layer.items()},
        "next_token": next_token.item(),
        "logits_kl": kl.item(),
        "gradients": {name: torch.zeros_like(leaves[name]) if g is None else g for name, g in gradients.items()},
        "tokens": count["relations"],
    }
