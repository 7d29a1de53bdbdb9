"""The same checks where Triton compiles: larger shapes, every entry of the tile table, no waiting for the GPU."""

from __future__ import annotations

import pytest
import relation_kl as rk
import torch
from relation_kl_checks import check, evaluate, make_case

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_scratch")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [40, 128, 256])
@pytest.mark.parametrize("segments", ["none", "documents"])
def test_16_bit(head_dim: int, dtype: torch.dtype, segments: str) -> None:
    check(make_case(1, 4, 1271, head_dim, dtype, segments, device="cuda"), "triton")
    check(make_case(1, 4, 1271, head_dim, dtype, segments, key_heads=2, device="cuda"), "triton")


@pytest.mark.parametrize("segments", ["none", "scattered"])
def test_float32(segments: str) -> None:
    check(make_case(1, 2, 777, 96, torch.float32, segments, device="cuda"), "triton")


@pytest.mark.parametrize("segments", ["none", "left", "windows"])
def test_long_bfloat16(segments: str) -> None:
    check(make_case(1, 2, 4096, 128, torch.bfloat16, segments, device="cuda"), "triton")


def test_auto_is_triton_and_waits_for_nothing() -> None:
    case = make_case(2, 4, 1024, 128, torch.bfloat16, "documents", device="cuda")
    wanted = evaluate(case, "triton")
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = evaluate(case, "auto")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(got, wanted, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_memory_is_linear() -> None:
    """Beyond inputs and the gradient: five floats a row, no product of lengths."""
    x = torch.randn(1, 8, 8192, 128, device="cuda", dtype=torch.bfloat16)
    g = torch.ones(1, 8, 8192, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    rk.relation_kl_value_and_grad(x, x, g)
    used = torch.cuda.max_memory_allocated() - before
    assert used <= x.nbytes + 10 * g.nbytes
