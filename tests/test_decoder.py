"""Passes that compute a part of a model: forwards are put back, and models that are built otherwise are left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from linearard.models.decoder import Decoder, replaced_forwards

SHAPE: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip


def _model(kind: str, **changes: Any) -> nn.Module:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SHAPE, **changes}))


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_parts_of_the_usual_models(kind: str) -> None:
    model: Any = _model(kind)
    parts = Decoder.of(model)
    assert parts.causal is model and parts.body is model.model and parts.head is model.lm_head
    assert parts.logits_factor == 1
    for layer in (0, 1):
        assert parts.attention(layer) is model.model.layers[layer].self_attn
    first, second = model.model.layers
    forwards = parts.nothing_behind(0)
    assert set(forwards) == {second, first.mlp, first.post_attention_layernorm, model.model.norm, first.self_attn}


def test_a_factor_of_the_logits_is_found_and_capped_ones_are_told_apart() -> None:
    assert Decoder.of(_model("granite", logits_scaling=8.0)).logits_factor == pytest.approx(1 / 8)
    assert Decoder.of(_model("gemma2", head_dim=8, final_logit_softcapping=30.0)).logits_factor is None


def test_layers_that_are_built_otherwise_are_computed() -> None:
    """Mixture of experts: what stands where Llama's MLP does may return something else."""
    assert Decoder.of(_model("mixtral", num_local_experts=2)).nothing_behind(0) == {}


def test_forwards_are_put_back() -> None:
    plain, own = nn.Identity(), nn.Identity()
    own.forward = lambda x: 2 * x
    with pytest.raises(RuntimeError), replaced_forwards({plain: lambda x: x + 1, own: lambda x: x + 3}):
        assert plain(torch.tensor(1)) == 2 and own(torch.tensor(1)) == 4
        raise RuntimeError
    assert plain(torch.tensor(1)) == 1 and own(torch.tensor(1)) == 2
    assert "forward" not in plain.__dict__
