"""The same checks where Triton compiles: larger shapes, every entry of the tile table, no waiting for the GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import relation_kl as rk
import torch
from relation_kl_checks import Case, check, evaluate, make_case
from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_scratch")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [40, 128, 192, 256])
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
    assert torch.equal(got.rows, wanted.rows)
    torch.testing.assert_close(got.grad_q, wanted.grad_q, rtol=1e-2, atol=1e-6)


def test_memory_is_linear() -> None:
    """Beyond inputs and the gradient: three floats a row and a float32 gradient, no product of lengths."""
    x = torch.randn(1, 8, 8192, 128, device="cuda", dtype=torch.bfloat16)
    g = torch.ones(1, 8, 8192, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    rk.relation_kl_value_and_grad(x, x, g)
    used = torch.cuda.max_memory_allocated() - before
    assert used <= x.nbytes + 4 * x.numel() + 3.1 * g.nbytes + 2**21


def overflowing(head_dim: int, dtype: torch.dtype) -> Case:
    case = make_case(1, 2, 900, head_dim, dtype, device="cuda")
    for x in (case.student_q, case.teacher_q):
        x[:, 1:] = x[:, :1]
        x[:, 1, 300:] *= 0.1
        x[:, 1, :100] *= 100
    return case


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("key_heads", [None, 2])
@pytest.mark.parametrize("segments", ["none", "left", "windows", "documents", "scattered"])
def test_deterministic_mode(segments: str, key_heads: int | None, head_dim: int) -> None:
    """Equal bit for bit from run to run, and as exact as ever."""
    case = make_case(1, 4, 2000, head_dim, torch.bfloat16, segments, key_heads=key_heads, device="cuda")
    check(case, "triton")
    first = evaluate(case, "triton")
    for _ in range(3):
        for a, b in zip(evaluate(case, "triton"), first, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [8, 64, 80, 128])
def test_deterministic_mode_at_the_edges(head_dim: int, dtype: torch.dtype) -> None:
    """Lengths around tiles, logits that overflow the pivot, and a first token with a norm 50 times the others'."""
    for seq_len in (1, 63, 64, 65, 127, 128, 129, 192, 257, 640):
        check(make_case(2, 2, seq_len, head_dim, dtype, device="cuda"), "triton")
        check(make_case(1, 4, seq_len, head_dim, dtype, key_heads=1, device="cuda"), "triton")
    case = overflowing(head_dim, dtype)
    check(case, "triton", softmax_scale=57.6 / head_dim)
    case = make_case(1, 4, 900, head_dim, torch.bfloat16, "documents", device="cuda")
    for x in (case.student_q, case.teacher_q):
        x[:, :, 0] *= 50
    check(case, "triton")
    got = evaluate(case._replace(teacher_q=case.student_q), "triton")
    assert (got.rows == 0).all() and (got.grad_q == 0).all()


@pytest.mark.usefixtures("deterministic")
def test_deterministic_mode_may_end_before_backward() -> None:
    """And begin there: what forward hands on says which kernels are to follow."""
    case = make_case(1, 4, 700, 128, torch.bfloat16, "documents", device="cuda")
    want = evaluate(case, "triton")
    for before in (True, False):
        student = case.student_q.clone().requires_grad_()
        torch.use_deterministic_algorithms(before)
        rows = rk.relation_kl(student, case.teacher_q, segment_ids=case.segment_ids, backend="triton")
        torch.use_deterministic_algorithms(not before)
        (grad,) = torch.autograd.grad(rows, student, case.row_grad)
        torch.testing.assert_close(grad.float(), want.grad_q.float(), rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("key_heads", [None, 2])
@pytest.mark.parametrize("segments", ["none", "documents"])
def test_above_128_channels_all_is_always_deterministic(segments: str, key_heads: int | None) -> None:
    case = make_case(1, 4, 2000, 256, torch.bfloat16, segments, key_heads=key_heads, device="cuda")
    first = evaluate(case, "triton")
    for _ in range(3):
        for a, b in zip(evaluate(case, "triton"), first, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_forward_is_always_deterministic(head_dim: int) -> None:
    case = make_case(1, 4, 3000, head_dim, torch.bfloat16, "documents", device="cuda")
    first = evaluate(case, "triton").rows
    assert all(torch.equal(evaluate(case, "triton").rows, first) for _ in range(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128, 136, 192, 256])
@pytest.mark.parametrize("seq_len", [1, 63, 64, 65, 127, 128, 129, 192, 255, 256, 257, 640])
def test_lengths_around_tiles(seq_len: int, head_dim: int, dtype: torch.dtype) -> None:
    check(make_case(2, 2, seq_len, head_dim, dtype, device="cuda"), "triton")
    check(make_case(1, 4, seq_len, head_dim, dtype, key_heads=1, device="cuda"), "triton")


@pytest.mark.parametrize("segments", ["left", "right", "all_masked", "one_key", "windows", "documents", "scattered"])
@pytest.mark.parametrize("key_heads", [None, 2])
def test_segments(segments: str, key_heads: int | None) -> None:
    """Padding is NaN in the student and inf in the teacher."""
    for head_dim, dtype in ((128, torch.bfloat16), (64, torch.float16), (256, torch.bfloat16), (192, torch.float16)):
        check(make_case(2, 4, 700, head_dim, dtype, segments, key_heads=key_heads, device="cuda"), "triton")


@pytest.mark.parametrize("segments", ["none", "left", "windows", "documents", "scattered"])
@pytest.mark.parametrize("key_heads", [None, 2])
def test_few_programs_share_all_row_tiles(
    segments: str, key_heads: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes many of them, with padding and without in turn, as on a long sequence."""
    for programs in (1, 3):
        monkeypatch.setattr("relation_kl.hopper_backend.multiprocessors", lambda device, number=programs: number)
        check(make_case(2, 4, 700, 128, torch.bfloat16, segments, key_heads=key_heads, device="cuda"), "triton")
        check(make_case(2, 4, 700, 64, torch.float16, segments, key_heads=key_heads, device="cuda"), "triton")


@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("scale", [1e-3, 1.0, -0.05, 0.0])
def test_softmax_scales(scale: float, head_dim: int) -> None:
    # A probability next to 1 is rounded once, by 6e-8; the plain version, by luck, is exact there.
    check(make_case(1, 2, 500, head_dim, torch.bfloat16, device="cuda"), "triton", softmax_scale=scale, floor=2e-6)


@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("key_heads", [None, 2])
def test_first_token_with_a_norm_50_times_the_others(key_heads: int | None, head_dim: int) -> None:
    case = make_case(1, 4, 900, head_dim, torch.bfloat16, key_heads=key_heads, device="cuda")
    for x in (case.student_q, case.teacher_q, case.student_k, case.teacher_k):
        if x is not None:
            x[:, :, 0] *= 50
    check(case, "triton")


@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_that_overflow_the_pivot(dtype: torch.dtype, head_dim: int) -> None:
    """Far from the diagonal, logits of up to 1e4 above the diagonal's: rows are done again with a running maximum."""
    check(overflowing(head_dim, dtype), "triton", softmax_scale=57.6 / head_dim)


def test_identical_inputs_give_exactly_nothing() -> None:
    kinds = (128, "none"), (64, "documents"), (128, "scattered"), (256, "none"), (192, "documents"), (256, "scattered")
    for head_dim, segments in kinds:
        case = make_case(1, 2, 1000, head_dim, torch.bfloat16, segments, poison=False, device="cuda")
        got = evaluate(case._replace(teacher_q=case.student_q), "triton")
        assert (got.rows == 0).all() and (got.grad_q == 0).all()


@pytest.mark.parametrize("head_dim", [128, 256])
def test_strided_inputs(head_dim: int) -> None:
    """[B, T, H, D] transposed; misaligned ones, which TMA cannot read, take the general kernels."""
    case = make_case(2, 4, 400, head_dim, torch.bfloat16, "documents", device="cuda")
    want = evaluate(case, "triton")

    def transposed(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def misaligned(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (1, 3))[..., 1:-3]

    for change in (transposed, misaligned):
        changed = case._replace(student_q=change(case.student_q), teacher_q=change(case.teacher_q))
        got = evaluate(changed, "triton")
        torch.testing.assert_close(got.rows, want.rows, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got.grad_q.float(), want.grad_q.float(), rtol=2e-2, atol=2e-3)


def test_a_million_tokens() -> None:
    """64-bit offsets and the grid's limits; the rows and gradients of a few tokens against float64."""
    length = 2**20
    torch.manual_seed(0)
    x = torch.randn(1, 1, length, 64, device="cuda", dtype=torch.bfloat16)
    teacher = (x.float() + 0.3 * torch.randn_like(x, dtype=torch.float32)).bfloat16()
    g = torch.zeros(1, 1, length, device="cuda")
    at = torch.tensor([0, 1, 127, 128, 524287, 524288, 1000000, length - 1], device="cuda")
    g[:, :, at] = torch.linspace(-1, 1, len(at), device="cuda")
    rows, grad = rk.relation_kl_value_and_grad(x, teacher, g)
    student = x[0, 0].double().requires_grad_()
    wanted = []
    for i in at.tolist():
        s = student[i] @ student[: i + 1].T * 64**-0.5
        t = teacher[0, 0, i].double() @ teacher[0, 0, : i + 1].double().T * 64**-0.5
        log_t = t.log_softmax(0)
        wanted.append((log_t.exp() * (log_t - s.log_softmax(0))).sum())
    values = torch.stack(wanted)
    (wanted_grad,) = torch.autograd.grad((values * g[0, 0, at]).sum(), student)
    torch.testing.assert_close(rows[0, 0, at].double(), values.detach(), rtol=1e-4, atol=1e-5)
    error = (grad[0, 0].double() - wanted_grad).norm() / wanted_grad.norm()
    assert error < 1e-2
