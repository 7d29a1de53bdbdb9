"""The shares of a relation's rows add up to the whole, whatever processes divide them.

On a GPU the kernels are compiled (on Hopper, 16-bit inputs run the Hopper kernels); elsewhere Triton's interpreter runs
the general ones.
"""

from __future__ import annotations

import pytest
import relation_kl as rk
import torch
from other_order import gradients_in_another_order
from relation_kl import torch_visit
from relation_kl.row_share import RowShare
from relation_kl.torch_backend import Operands
from relation_kl_checks import Case, assert_within_budget, evaluate, exact, make_case
from torch import Tensor

SEGMENTS = ("none", "left", "right", "windows", "documents", "scattered", "all_masked", "one_key")


def rows_of(index: int, count: int, seq_len: int) -> Tensor:
    """Which rows are of a share, bool [T]."""
    chunk = torch.arange(seq_len) // -(-seq_len // (2 * count))
    return (chunk == index) | (chunk == 2 * count - 1 - index)


def shares_of(case: Case, count: int, backend: str, at_once: bool = False) -> list[tuple[Tensor, Tensor]]:
    """Rows and gradient of each share; upstream gradients of the rows of others are NaN."""
    found = []
    for index in range(count):
        mine = rows_of(index, count, case.row_grad.shape[2]).to(case.row_grad.device)
        upstream = torch.where(mine, case.row_grad, float("nan"))
        options = {"segment_ids": case.segment_ids, "row_share": (index, count), "backend": backend}
        if at_once:
            rows, grad = rk.relation_kl_value_and_grad(case.student_q, case.teacher_q, upstream, **options)
        else:
            x = case.student_q.detach().requires_grad_()
            rows = rk.relation_kl(x, case.teacher_q, **options)
            (grad,) = torch.autograd.grad(rows, x, upstream.to(rows.dtype))
            rows = rows.detach()
        assert (rows[:, :, ~mine] == 0).all(), "not of this share"
        assert grad.dtype == case.student_q.dtype
        found.append((rows, grad))
    return found


def check(case: Case, count: int, backend: str, at_once: bool = False) -> None:
    shares = shares_of(case, count, backend, at_once)
    rows = torch.stack([rows for rows, _ in shares]).sum(0)
    grad = torch.stack([grad.to(rows.dtype) for _, grad in shares]).sum(0)
    whole, truth, plain = evaluate(case, backend), exact(case), evaluate(case, "reference")
    assert_within_budget("rows", rows, truth.rows, plain.rows, 1e-6)
    assert_within_budget("gradient", grad, truth.grad_q, plain.grad_q, 1e-6)
    if case.student_q.dtype == torch.float32:
        assert (rows - whole.rows).abs().max() <= 1e-5 * max(1.0, float(whole.rows.abs().max()))
        assert (grad - whole.grad_q).abs().max() <= 1e-5 * max(1.0, float(whole.grad_q.abs().max()))
    if case.segment_ids is not None:
        padding = (case.segment_ids < 0)[:, None].expand_as(rows)
        assert (rows[padding] == 0).all() and (grad[padding] == 0).all()


@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch(segments: str, dtype: torch.dtype) -> None:
    for seq_len in (1, 2, 41, 131):
        case = make_case(2, 2, seq_len, 16, dtype, segments)
        for count in (1, 2, 3):
            check(case, count, "torch", at_once=count == 2)


@pytest.mark.parametrize("segments", ["none", "right", "documents"])
def test_gradients_may_lie_in_any_order(segments: str) -> None:
    for seq_len in (41, 131):
        case = make_case(2, 2, seq_len, 16, torch.float32, segments)
        with gradients_in_another_order():
            shares = shares_of(case, 2, "torch")
        for (_, grad), (_, want) in zip(shares, shares_of(case, 2, "torch"), strict=True):
            assert torch.equal(grad, want)


def test_torch_float64() -> None:
    check(make_case(1, 1, 67, 8, torch.float64, "documents"), 2, "torch")


@pytest.mark.parametrize(
    ("segments", "dtype", "seq_len", "count"),
    [
        ("none", torch.float32, 150, 2),
        ("documents", torch.float16, 131, 2),
        ("right", torch.bfloat16, 75, 3),
        ("scattered", torch.float32, 41, 2),
    ],
)
@pytest.mark.usefixtures("poisoned_scratch")
def test_triton(segments: str, dtype: torch.dtype, seq_len: int, count: int, device: torch.device) -> None:
    pytest.importorskip("triton", reason="needs triton, which is not installed")
    check(make_case(2, 2, seq_len, 16, dtype, segments, device=device), count, "triton", at_once=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_kernels(dtype: torch.dtype, head_dim: int, device: torch.device) -> None:
    for seq_len in (1000, 4096):
        for segments in ("none", "windows", "documents", "right"):
            case = make_case(2, 2, seq_len, head_dim, dtype, segments, device=device)
            for count in (2, 3, 4):
                check(case, count, "triton", at_once=count == 2)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_inputs_give_exactly_zero(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    if backend == "triton":
        pytest.importorskip("triton", reason="needs triton, which is not installed")
    case = make_case(1, 2, 77, 64 if device.type == "cuda" else 16, dtype, device=device)
    case = case._replace(teacher_q=case.student_q.clone())
    for rows, grad in shares_of(case, 2, backend):
        assert (rows == 0).all() and (grad == 0).all()


def test_strided_inputs_and_upstream_gradients() -> None:
    case = make_case(2, 3, 41, 16, torch.float32, "windows")
    student, teacher = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (case.student_q, case.teacher_q))
    for row_grad in (case.row_grad.transpose(0, 1).contiguous().transpose(0, 1), torch.ones(()).expand(2, 3, 41)):
        check(case._replace(student_q=student, teacher_q=teacher, row_grad=row_grad), 2, "torch")


class _Spy:
    """`torch_visit`, which counts the pairs of rows and keys that are visited."""

    prepare, backward = torch_visit.prepare, torch_visit.backward
    own_logits, conclude = staticmethod(torch_visit.own_logits), staticmethod(torch_visit.conclude)

    def __init__(self) -> None:
        self.pairs, self.visits = 0.0, 0

    def forward(self, visit: torch_visit.Visit, scale: float, state: torch_visit.State) -> None:
        pairs = visit.q_s.shape[0] * visit.q_s.shape[2] * visit.k_s.shape[2]
        self.pairs += pairs / 2 if visit.diagonal else pairs
        self.visits += 1
        torch_visit.forward(visit, scale, state)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_work_is_divided_evenly_and_segments_apart_are_not_visited(count: int) -> None:
    x = make_case(1, 1, 96, 16, torch.float32).student_q
    operands = Operands(x, x, x, x, True)
    windows = (torch.arange(96) // (96 // (2 * count)))[None]
    for index in range(count):
        one, many = _Spy(), _Spy()
        RowShare(index, count, one).forward(operands, 1.0, None)  # type: ignore[arg-type]
        RowShare(index, count, many).forward(operands, 1.0, windows)  # type: ignore[arg-type]
        assert (one.visits, one.pairs) == (2, 96 * 96 / 2 / count)
        assert (many.visits, many.pairs) == (1, (96 // (2 * count)) ** 2)


def test_autocast_changes_nothing() -> None:
    case = make_case(1, 1, 41, 16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        cast = shares_of(case, 2, "torch", at_once=True)
    for a, b in zip(cast, shares_of(case, 2, "torch", at_once=True), strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
