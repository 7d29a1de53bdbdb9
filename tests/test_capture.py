"""Attention inside segments against a dense masked one, and what the registered function refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from linearard.capture import AttentionPass, attention_forward, segment_attention
from linearard.errors import UserError
from linearard.layout import segments_of

CPU = torch.device("cpu")
SEGMENTS = {
    "one segment": [24],
    "windows": [8, 8, 8],
    "ragged": [5, 1, 11, 7],
    "windows and a rest": [10, 10, 4],
}


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ids: torch.Tensor, scaling: float) -> torch.Tensor:
    """[B, T, H, D] from the definition: one softmax a row over the keys of the own run at or before it."""
    groups, length = q.shape[1] // k.shape[1], q.shape[2]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    visible = torch.ones(length, length, dtype=torch.bool).tril() & (ids[:, :, None] == ids[:, None, :])
    scores = (scaling * q @ k.transpose(-1, -2)).masked_fill(~visible[:, None], float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def _inputs(kv_heads: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(kv_heads)
    return [
        torch.randn(2, heads, 24, 8, generator=generator, dtype=dtype).requires_grad_()
        for heads in (4, kv_heads, kv_heads)
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("name", SEGMENTS)
def test_segment_attention_is_the_dense_one(name: str, kv_heads: int, dtype: torch.dtype) -> None:
    row = torch.cat([torch.full((n,), i) for i, n in enumerate(SEGMENTS[name])])
    second = torch.zeros(24, dtype=torch.int64) if name == "ragged" else row  # rows may differ
    ids = torch.stack([row, second])
    tensors = _inputs(kv_heads, dtype)
    out = segment_attention(*tensors, segments_of(ids, CPU), 0.4)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=dtype)
    gradients = torch.autograd.grad(out, tensors, upstream)
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    expected = _dense(*doubles, ids, 0.4)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    assert torch.allclose(out.double(), expected, atol=tolerance)
    for a, b in zip(gradients, torch.autograd.grad(expected, doubles, upstream.double()), strict=True):
        assert torch.allclose(a.double(), b, atol=5 * tolerance)


def test_segments_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[1, 24\].*\[2, 24\]"):
        segment_attention(*_inputs(2, torch.float32), segments_of(torch.zeros(1, 24), CPU), 0.4)


def test_the_observer_may_replace_what_attention_sees() -> None:
    q, k, v = (x.detach() for x in _inputs(2, torch.float64))
    segments, seen = segments_of(torch.zeros(2, 24, dtype=torch.int64), CPU), []

    def observer(layer: int, *args):
        seen.append((layer, args[3]))
        return args[0], args[1], 2 * args[2]

    module = nn.Identity()
    module.layer_idx = 3
    for shards in (True, False):
        out, weights = attention_forward(
            module, q, k, v, None, attention_pass=AttentionPass(segments, None, observer, shards)
        )
        assert weights is None
        assert torch.allclose(out, 2 * segment_attention(q, k, v, segments, 8**-0.5))
    assert seen == [(3, 8**-0.5)] * 2  # once per pass, with the default scale


@pytest.mark.parametrize(
    "extra", [{"softcap": 30.0}, {"s_aux": torch.zeros(4)}, {"dropout": 0.1}, {"attention_pass": None}]
)
def test_attention_that_cannot_be_observed_or_is_no_plain_softmax_is_refused(extra: dict) -> None:
    q, k, v = (x.detach() for x in _inputs(2, torch.float32))
    segments = segments_of(torch.zeros(2, 24), CPU)
    with pytest.raises(UserError, match=r"^model\.path: "):
        attention_forward(nn.Identity(), q, k, v, None, **{"attention_pass": AttentionPass(segments), **extra})
