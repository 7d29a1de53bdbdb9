"""The RoPE of every type: Hugging Face's own frequencies at the training length, and the native ones on request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import NATIVE, SEQ_LEN, VOCAB
from rope_types import LINEAR, LLAMA3, LONGROPE, YARN
from torch import nn
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from linearard.errors import UserError
from linearard.models.rope import RopeSwitch, scaled_config

TYPES: dict[str, tuple[dict[str, Any], int]] = {  # rope_parameters, max_position_embeddings of the student
    "linear": (LINEAR, 128),
    "yarn": (YARN, 64),
    "yarn with its own attention factor": ({**YARN, "attention_factor": 1.5}, 64),
    "llama3": (LLAMA3, 128),
    "longrope": (LONGROPE, 128),
    "dynamic": ({"rope_type": "dynamic", "factor": 8.0}, NATIVE),  # reads it as the native length: it must stay
    "linear with another base": ({**LINEAR, "rope_theta": 1000.0}, 128),
}


def _native(**changes: Any) -> Any:
    rope = {"rope_type": "default", "rope_theta": 100.0}
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"vocab_size": VOCAB, "max_position_embeddings": NATIVE, "rope_parameters": rope}
    return LlamaConfig(**{**shape, **changes})


def _rotary(config: Any) -> nn.Module:
    return LlamaRotaryEmbedding(config=config)


def _switched(rope_parameters: dict[str, Any], length: int) -> tuple[nn.Module, Any, Any]:
    """(a rotary with a switch in it, the switch, the student's configuration)."""
    native = _native()
    scaled = scaled_config(native, rope_parameters, "refuse")
    holder = nn.Module()
    holder.rotary_emb = _rotary(native)
    return holder.rotary_emb, RopeSwitch(holder, native, scaled, length, torch.device("cpu")), scaled


def _equal(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", TYPES)
def test_frequencies_are_hugging_face_s_own_at_the_training_length(name: str, tmp_path: Path) -> None:
    parameters, longest = TYPES[name]
    rotary, switch, scaled = _switched(parameters, SEQ_LEN)
    x, positions = torch.zeros(1), torch.arange(SEQ_LEN)[None]
    assert scaled.max_position_embeddings == longest
    assert parameters.items() <= scaled.rope_parameters.items()
    scaled.save_pretrained(tmp_path)
    for config in (scaled, AutoConfig.from_pretrained(tmp_path)):  # as it is, and as an exported folder gives it
        assert _equal(rotary(x, positions), _rotary(config)(x, positions))
    native = _rotary(_native())(x, positions)
    assert not _equal(rotary(x, positions), native)
    with switch.native():
        assert _equal(rotary(x, positions), native)
    assert not _equal(rotary(x, positions), native)


@pytest.mark.parametrize("name", TYPES)
def test_a_shard_rotates_as_the_whole_sequence_does(name: str) -> None:
    rotary, _, scaled = _switched(TYPES[name][0], SEQ_LEN)
    x, positions = torch.zeros(1), torch.arange(SEQ_LEN)[None]
    whole = rotary(x, positions)
    for start in (48, 0, 16):  # not in order: no state is left behind by an earlier shard
        part = slice(start, start + 16)
        assert _equal(rotary(x, positions[:, part]), tuple(t[:, part] for t in whole))
    if name in ("dynamic", "longrope"):  # what Hugging Face's own would do with the first shard
        first = _rotary(scaled)(x, positions[:, :16])
        assert not _equal(first, tuple(t[:, :16] for t in whole))


@pytest.mark.parametrize("name", ["linear", "yarn", "dynamic", "longrope"])
def test_casting_the_model_does_not_round_the_frequencies(name: str) -> None:
    native = _native()
    scaled = scaled_config(native, TYPES[name][0], "refuse")
    model = LlamaForCausalLM(native)
    switch = RopeSwitch(model, native, scaled, SEQ_LEN, torch.device("cpu"))
    positions = torch.arange(SEQ_LEN)[None]
    before = model.model.rotary_emb(torch.zeros(1), positions)
    model.bfloat16()
    assert _equal(model.model.rotary_emb(torch.zeros(1), positions), before)
    rounded = model.model.rotary_emb(torch.zeros(1, dtype=torch.bfloat16), positions)
    assert rounded[0].dtype == torch.bfloat16 and _equal(rounded, tuple(t.bfloat16() for t in before))
    with switch.native():
        expected = _rotary(_native())(torch.zeros(1), positions)
        assert _equal(model.model.rotary_emb(torch.zeros(1), positions), expected)


def test_a_replica_keeps_the_native_rope() -> None:
    rotary, switch, _ = _switched(LINEAR, SEQ_LEN)
    switch.make_native()
    x, positions = torch.zeros(1), torch.arange(SEQ_LEN)[None]
    expected = _rotary(_native())(x, positions)
    assert _equal(rotary(x, positions), expected)
    with switch.native():
        assert _equal(rotary(x, positions), expected)
    assert _equal(rotary(x, positions), expected)


def test_a_model_with_several_rotary_embeddings_is_refused() -> None:
    native = _native()
    holder = nn.ModuleList([nn.Module(), nn.Module()])
    for module in holder:
        module.rotary_emb = _rotary(native)
    with pytest.raises(UserError, match="expected one rotary embedding shared by all layers, found 2"):
        RopeSwitch(holder, native, scaled_config(native, LINEAR, "refuse"), SEQ_LEN, torch.device("cpu"))
