"""What only the Triton backend has: ids read as they are, flagged row tiles, and launches that are all its own."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import relation_kl as rk
import tile_bounds_reference as reference
import torch
from relation_kl import triton_backend
from relation_kl.segment_kernels import tile_bounds
from relation_kl.tiles import HOPPER_BLOCK
from relation_kl.torch_backend import Operands
from relation_kl_checks import Case, Result, assert_within_budget, evaluate, exact, make_case
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.usefixtures("poisoned_scratch")


def operands_of(case: Case) -> Operands:
    if case.student_k is None or case.teacher_k is None:
        return Operands(case.student_q, case.student_q, case.teacher_q, case.teacher_q, True)
    return Operands(case.student_q, case.student_k, case.teacher_q, case.teacher_k, False)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_segment_ids_of_any_type(dtype: torch.dtype, device: torch.device) -> None:
    """Also strided ones, and negative ones of any value; an unsigned type has no padding."""
    case = make_case(2, 1, 129, 8, torch.float32, device=device)
    ids = torch.tensor([7, 0, 100, -1, 3], device=device)[torch.arange(129, device=device) // 30]
    if dtype == torch.uint8:
        ids[ids < 0] = 255
    want = evaluate(case._replace(segment_ids=ids.expand(2, -1)), "torch")
    ids = torch.where(ids < 0, -100 + torch.arange(129, device=device) % 2, ids).to(dtype)
    for each in (ids.expand(2, -1), torch.stack([ids, ids], 1).T):
        got = evaluate(case._replace(segment_ids=each), "triton")
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_segment_ids_that_differ_beyond_32_bits(device: torch.device) -> None:
    case = make_case(1, 2, 129, 8, torch.float32, key_heads=1, device=device)
    number = torch.tensor([5, 5 + 2**32, 5, 2**63 - 1, -(2**40)], device=device)
    ids = number[torch.arange(129, device=device) // 30][None]
    got = evaluate(case._replace(segment_ids=ids), "triton")
    torch.testing.assert_close(got, evaluate(case._replace(segment_ids=ids), "torch"), rtol=1e-4, atol=1e-5)
    ids = rk.cut_into_windows(torch.full_like(ids, 3), 50)
    got = evaluate(case._replace(segment_ids=ids), "triton")
    torch.testing.assert_close(got, evaluate(case._replace(segment_ids=ids), "torch"), rtol=1e-4, atol=1e-5)


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_is_launched_but_the_kernels(dtype: torch.dtype, device: torch.device) -> None:
    case = make_case(1, 2, 129, 8, dtype, "windows", key_heads=1, device=device)
    ids = case.segment_ids
    assert ids is not None
    ids = ids.contiguous()
    for each in (case, case._replace(student_k=None, teacher_k=None)):
        with _Operations() as seen:
            triton_backend.value_and_grad(operands_of(each), 1.0, ids, case.row_grad)
        # The interpreter copies and sets; poisoned_scratch detaches and fills.
        # The Hopper kernels add up a gradient in float32, which is then multiplied into its place.
        hopper = {"zeros", "mul"}
        assert seen.names <= {"empty", "empty_like", "new_empty"} | {"set_", "copy_"} | {"detach", "fill_"} | hopper


@pytest.mark.parametrize("key_heads", [None, 1])
@pytest.mark.parametrize("factor", [1e30, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_upstream_gradients_of_any_size(
    dtype: torch.dtype, factor: float, key_heads: int | None, device: torch.device
) -> None:
    """Strided ones, with rows of padding that hold anything."""
    case = make_case(1, 2, 150, 24, dtype, "documents", key_heads=key_heads, device=device)
    assert case.segment_ids is not None
    padding = (case.segment_ids < 0)[:, None]
    got = evaluate(case._replace(row_grad=(case.row_grad * factor).masked_fill(padding, float("nan")).mT.mT), "triton")
    truth, plain = exact(case), evaluate(case, "reference")
    for name, a, b, c in zip(Result._fields[1:], got[1:], truth[1:], plain[1:], strict=True):
        if a is not None and b is not None and c is not None:
            assert_within_budget(name, a.double() / factor, b, c, 2e-7)


def test_upstream_gradients_of_fp16(device: torch.device) -> None:
    """Padding takes no part in the unit that they are divided by."""
    case = make_case(1, 2, 150, 24, torch.float16, "documents", device=device)
    assert case.segment_ids is not None
    padding = (case.segment_ids < 0)[:, None]
    got = evaluate(case._replace(row_grad=case.row_grad.masked_fill(padding, float("inf"))), "triton")
    assert torch.equal(got.grad_q, evaluate(case, "triton").grad_q)


def bounds_of(ids: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """As the Hopper kernels are given them."""
    if ids is None:
        return None
    ids = ids.long().contiguous()
    return ids, tile_bounds(ids, HOPPER_BLOCK, HOPPER_BLOCK)


def relative_sums(q: Tensor, k: Tensor, softmax_scale: float, ids: Tensor | None) -> Tensor:
    """Float64 [B, H, T]: what `triton_kernels.relative_sum` is to return."""
    logits = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT * softmax_scale
    visible = torch.ones_like(logits, dtype=torch.bool).tril()
    if ids is not None:
        visible &= reference.related(ids)[:, None]
    lse = logits.masked_fill(~visible, -math.inf).logsumexp(-1)
    excess = (lse - logits.diagonal(dim1=-2, dim2=-1)) / math.log(2)
    return torch.where(excess <= 80, excess.exp2(), -excess)


@pytest.mark.parametrize("softmax_scale", [0.2, 30.0])
@pytest.mark.parametrize("segments", ["none", "documents", "all_masked"])
@pytest.mark.parametrize("key_heads", [None, 2])
def test_flagged_row_tiles(key_heads: int | None, segments: str, softmax_scale: float, device: torch.device) -> None:
    """Flagged ones are written, with what the Hopper backward kernel is given; the others are not touched."""
    case = make_case(2, 4, 300, 24, torch.float32, segments, key_heads=key_heads, device=device)
    operands, ids = operands_of(case), case.segment_ids
    want, _ = triton_backend.forward(operands, softmax_scale, ids)
    sum_s = relative_sums(operands.student_q, operands.student_k, softmax_scale, ids)
    sum_t = relative_sums(operands.teacher_q, operands.teacher_k, softmax_scale, ids)
    flags = torch.randint(0, 3, (2, 4, 3, 2), dtype=torch.int32).to(device)
    flags[0, 0] = torch.tensor([[0, 0], [0, 1], [1, 0]])
    flags[..., 2, 1] = 0  # it has no rows
    results = [torch.full_like(want, value) for value in (-1.0, -2.0, -3.0)]
    triton_backend.forward_again(operands, softmax_scale, bounds_of(ids), flags, *results)

    flagged = (flags != 0).flatten(-2).repeat_interleave(HOPPER_BLOCK, 2)[..., :300]
    live = torch.ones_like(flagged) if ids is None else (ids >= 0)[:, None].expand_as(flagged)
    if key_heads is not None and segments == "none":
        assert (sum_t < 0).any() == (softmax_scale == 30.0)
    of_padding, untouched = (0.0, 1.0, 1.0), (-1.0, -2.0, -3.0)
    for got, wanted, dead, before in zip(results, (want, sum_s, sum_t), of_padding, untouched, strict=True):
        wanted = wanted.masked_fill(~live, dead).masked_fill(~flagged, before)
        torch.testing.assert_close(got.double(), wanted.double(), rtol=1e-5 * max(1, softmax_scale), atol=1e-5)


@pytest.mark.parametrize(
    ("fetchable", "change"),
    [
        pytest.param(True, lambda x: x, id="contiguous"),
        pytest.param(True, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), id="tokens-before-heads"),
        pytest.param(True, lambda x: torch.nn.functional.pad(x, (0, 8))[..., :-8], id="padded"),
        pytest.param(True, lambda x: x[:, :, 3:], id="later-tokens"),
        pytest.param(True, lambda x: x[:, :1, :1].as_strided((2, 1, 1, 24), (960, 3, 1, 1)), id="odd-strides-of-1"),
        pytest.param(False, lambda x: torch.nn.functional.pad(x, (1, 7))[..., 1:-7], id="misaligned-base"),
        pytest.param(False, lambda x: torch.nn.functional.pad(x, (0, 4))[..., :-4], id="misaligned-tokens"),
        pytest.param(False, lambda x: x[:, :1].expand(-1, 2, -1, -1), id="expanded"),
        pytest.param(False, lambda x: x.mT.contiguous().mT, id="channels-before-tokens"),
        pytest.param(False, lambda x: torch.cat([x, x], -1)[..., ::2], id="every-other-channel"),
    ],
)
def test_what_hopper_can_fetch(fetchable: bool, change: Callable[[Tensor], Tensor]) -> None:
    """Every one of the four tensors counts."""
    # Needs Gluon, of triton 3.6 and newer, but no GPU.
    hopper_backend = pytest.importorskip("relation_kl.hopper_backend", exc_type=ImportError)
    x = torch.zeros(2, 2, 20, 24, dtype=torch.bfloat16)
    for name in ("student_q", "student_k", "teacher_q", "teacher_k"):
        operands = Operands(x, x, x, x, False)._replace(**{name: change(x)})
        assert hopper_backend.can_fetch(operands) == fetchable
