"""relation_kl and attention_kl against the dense float64 version, on both backends."""

from __future__ import annotations

import pytest
import relation_kl as rk
import torch
from relation_kl import torch_backend
from relation_kl_checks import Case, check, evaluate, exact, make_case
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("poisoned_scratch")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["torch", "triton"]
SEGMENTS = ["none", "left", "right", "all_masked", "one_key", "windows", "documents", "scattered"]


@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("seq_len", "head_dim"), [(1, 8), (2, 24), (41, 24), (129, 64), (129, 256), (401, 96)])
def test_torch_backend(seq_len: int, head_dim: int, dtype: torch.dtype, segments: str, device: torch.device) -> None:
    check(make_case(2, 2, seq_len, head_dim, dtype, segments, device=device), "torch")
    check(make_case(2, 4, seq_len, head_dim, dtype, segments, key_heads=2, device=device), "torch")


@pytest.mark.parametrize("segments", SEGMENTS)
def test_triton_segments(segments: str, device: torch.device) -> None:
    check(make_case(2, 1, 129, 24, torch.float32, segments, device=device), "triton")
    check(make_case(2, 2, 129, 24, torch.float32, segments, key_heads=1, device=device), "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("seq_len", "head_dim", "segments"),
    [
        (1, 8, "none"),
        (2, 256, "one_key"),
        (41, 96, "scattered"),
        (401, 64, "documents"),
        (401, 128, "none"),
    ],
)
def test_triton_shapes(seq_len: int, head_dim: int, segments: str, dtype: torch.dtype, device: torch.device) -> None:
    check(make_case(1, 1, seq_len, head_dim, dtype, segments, device=device), "triton")
    if seq_len < 100:
        check(make_case(1, 4, seq_len, head_dim, dtype, segments, key_heads=2, device=device), "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    """Logits of 1e4 in size, of either sign: rows whose softmax is a single key, or two.

    At 1e4 neighbouring float32 numbers are 1e-3 apart, so a logit that is computed twice may change its probability
    by as much: hence the wider floor. In 16-bit inputs the plain version's own error is far above it.
    """
    case = make_case(1, 2, 70, 16, dtype, device=device)
    scale = 1e4 / (case.student_q @ case.student_q.mT).abs().max().item()
    check(case, backend, scale, floor=1e4 * 2**-23)
    check(case, backend, -scale, floor=1e4 * 2**-23)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_first_token_of_large_norm(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    case = make_case(1, 2, 70, 64, dtype, device=device)
    case.student_q[:, :, 0] *= 50
    case.teacher_q[:, :, 0] *= 50
    # Logits with the first token reach 200; see test_large_logits.
    check(case, backend, floor=200 * 2**-23)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend: str, device: torch.device) -> None:
    """Transposed, sliced and expanded inputs, and gradients, give what their contiguous copies give."""
    case = make_case(2, 2, 41, 24, torch.float32, key_heads=1, device=device)
    assert case.student_k is not None and case.teacher_k is not None
    wanted = evaluate(case, backend)
    wide = torch.zeros(2, 41, 2, 48, device=device)
    wide[..., ::2] = case.teacher_q.transpose(1, 2)
    strided = case._replace(
        student_q=case.student_q.transpose(1, 2).contiguous().transpose(1, 2),
        teacher_q=wide[..., ::2].transpose(1, 2),
        student_k=case.student_k.mT.contiguous().mT,
        row_grad=case.row_grad.mT.contiguous().mT,
    )
    got = evaluate(strided, backend)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

    expanded = case._replace(
        student_k=case.student_k[:1].expand(2, -1, -1, -1),
        teacher_k=case.teacher_k[:, :, :1].expand(-1, -1, 41, -1),
        row_grad=torch.full((), 0.7, device=device).expand(2, 2, 41),
    )
    check(expanded, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("key_heads", [None, 1])
def test_small_weights_survive_fp16(backend: str, key_heads: int | None, device: torch.device) -> None:
    """Upstream gradients that would vanish in 16-bit weights, where the gradient itself would not.

    Small inputs under a large softmax_scale: the logits are ordinary, the gradient is in fp16's normal range.
    """
    case = make_case(1, 1, 129, 64, torch.float16, key_heads=key_heads, device=device)
    inputs = (None if x is None else x * 2**-8 for x in case[:4])
    case = Case(*inputs, case.row_grad * 1e-5, None)  # type: ignore[arg-type]
    got, truth = evaluate(case, backend, 2.0**13), exact(case, 2.0**13)
    for a, b in zip(got[1:], truth[1:], strict=True):
        if a is not None and b is not None:
            assert (a.double() - b).abs().max() <= 2e-3 * b.abs().max() + 6e-8


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_inputs_give_exactly_zero(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    case = make_case(2, 2, 131, 40, dtype, "documents", key_heads=1, poison=False, device=device)
    assert case.student_k is not None
    # A copy at another alignment: equal values, not the same memory.
    copy = torch.empty(case.student_q.numel() + 1, dtype=dtype, device=device)[1:].view_as(case.student_q)
    case = case._replace(teacher_q=copy.copy_(case.student_q), teacher_k=case.student_k.clone())
    for each in (case, case._replace(student_k=None, teacher_k=None)):
        for tensor in evaluate(each, backend):
            assert tensor is None or (tensor == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_call_twice_gives_the_same_bits(backend: str, device: torch.device) -> None:
    case = make_case(2, 2, 131, 40, torch.float32, "scattered", key_heads=1, device=device)
    for a, b in zip(evaluate(case, backend), evaluate(case, backend), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_tensor_as_query_and_key(backend: str, device: torch.device) -> None:
    """The gradients of both roles add up: attention of x with x is the self-relation of x."""
    case = make_case(1, 2, 41, 24, torch.float32, device=device)
    x = case.student_q.clone().requires_grad_()
    rows = rk.attention_kl(x, x, case.teacher_q, case.teacher_q, backend=backend)
    rows.backward(case.row_grad)
    wanted = evaluate(case, backend)
    torch.testing.assert_close(rows.detach(), wanted.rows)
    torch.testing.assert_close(x.grad, wanted.grad_q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("key_heads", [None, 1])
def test_value_and_grad_is_forward_and_backward(backend: str, key_heads: int | None, device: torch.device) -> None:
    case = make_case(2, 2, 41, 24, torch.bfloat16, "documents", key_heads=key_heads, device=device)
    wanted = evaluate(case, backend)
    options = {"segment_ids": case.segment_ids, "backend": backend}
    q = case.student_q.clone().requires_grad_()
    if case.student_k is None or case.teacher_k is None:
        got = rk.relation_kl_value_and_grad(q, case.teacher_q, case.row_grad, **options)
    else:
        got = rk.attention_kl_value_and_grad(
            q, case.student_k, case.teacher_q, case.teacher_k, case.row_grad, **options
        )
    for a, b in zip(got, wanted, strict=False):
        assert not a.requires_grad and a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradcheck(backend: str) -> None:
    torch.manual_seed(0)
    q, tq = torch.randn(2, 1, 2, 5, 8, dtype=torch.float64)
    k, tk = torch.randn(2, 1, 1, 5, 8, dtype=torch.float64)
    ids = torch.tensor([[0, 0, -1, 4, 4]])
    options = {} if backend == "reference" else {"backend": backend}
    module = rk.reference if backend == "reference" else rk
    for segment_ids in (None, ids):
        assert torch.autograd.gradcheck(
            lambda x, s=segment_ids: module.relation_kl(x, tq, segment_ids=s, **options),
            (q.requires_grad_(),),
        )
        assert torch.autograd.gradcheck(
            lambda x, y, s=segment_ids: module.attention_kl(x, y, tq, tk, segment_ids=s, **options),
            (q.requires_grad_(), k.requires_grad_()),
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_surroundings(backend: str, device: torch.device) -> None:
    """The teacher is a constant, checkpointing and autocast change nothing, and no_grad gives plain rows."""
    case = make_case(1, 2, 41, 24, torch.float32, device=device)
    wanted = evaluate(case, backend)
    q = case.student_q.clone().requires_grad_()
    t = case.teacher_q.clone().requires_grad_()

    def rows_of(x: torch.Tensor) -> torch.Tensor:
        return rk.relation_kl(x, t, backend=backend)

    with torch.autocast(device.type, dtype=torch.bfloat16):
        rows = checkpoint(rows_of, q, use_reentrant=False)
        rows.backward(case.row_grad)
    assert torch.equal(rows.detach(), wanted.rows)
    assert q.grad is not None and torch.equal(q.grad, wanted.grad_q)
    assert t.grad is None
    with torch.no_grad():
        assert not rows_of(q).requires_grad
    assert not rk.relation_kl(case.student_q, t, backend=backend).requires_grad


class _LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                # What is held in memory, not how it is looked at: masks may be expanded views.
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_is_linear_in_the_sequence(backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    # One sequence at a time, so that what is measured is the least a sequence needs.
    monkeypatch.setattr(torch_backend, "_CPU_LOGITS", 1)
    monkeypatch.setattr(torch_backend, "_GPU_LOGITS", 1)
    for seq_len in (256, 512) if backend == "triton" else (512, 1024, 2048):
        case = make_case(1, 1, seq_len, 8, torch.float32, device=device)
        with _LargestTensor() as largest:
            evaluate(case, backend)
        assert largest.numel <= 4 * 64 * seq_len


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_above_the_diagonal_or_outside_a_segment_is_read(backend: str, device: torch.device) -> None:
    """NaN in one segment reaches neither the other segments nor, in the forward, the tiles before it."""
    case = make_case(1, 1, 384, 8, torch.float32, device=device)
    ids = (torch.arange(384, device=device) // 128)[None]
    wanted = evaluate(case._replace(segment_ids=ids), backend)
    broken = case._replace(student_q=case.student_q.clone(), segment_ids=ids)
    broken.student_q[:, :, 128:256] = float("nan")
    got = evaluate(broken, backend)
    for a, b in ((got.rows, wanted.rows), (got.grad_q, wanted.grad_q)):
        assert torch.equal(a[:, :, :128], b[:, :, :128]) and torch.equal(a[:, :, 256:], b[:, :, 256:])
        assert a[:, :, 128:256].isnan().all()

    whole = evaluate(case, backend).rows
    last = broken._replace(segment_ids=None)
    assert torch.equal(evaluate(last, backend).rows[:, :, :128], whole[:, :, :128])
