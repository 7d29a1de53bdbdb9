"""Cases, ways for tensors to lie, memory counted and the error budget: what the tests of relation_kl share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import relation_kl as rk
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Case(NamedTuple):
    """Tensors of one comparison; k is None for a self-relation."""

    student_q: Tensor
    teacher_q: Tensor
    student_k: Tensor | None
    teacher_k: Tensor | None
    row_grad: Tensor
    segment_ids: Tensor | None


class Result(NamedTuple):
    rows: Tensor
    grad_q: Tensor
    grad_k: Tensor | None


# x [B, H, T, D] with the same values.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads in a token": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "every other channel": lambda x: torch.stack([x, x], -1)[..., 0],
}


class Alive(TorchDispatchMode):
    """The most bytes alive at once, within, of what is made there: of storages of at least `least` bytes.

    Args:
        least: what is smaller is not counted.
        inputs: nor are these.
    """

    def __init__(self, least: int, *inputs: Tensor) -> None:
        super().__init__()
        self.least, self.most, self.looking = least, 0, True
        self.inputs = {x.untyped_storage()._cdata for x in inputs}
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.looking:
            self.made = {key: found for key, found in self.made.items() if not found[0].expired()}
            for x in tree_leaves(result):
                storage = x.untyped_storage() if isinstance(x, Tensor) else None
                if storage is not None and storage.nbytes() >= self.least and storage._cdata not in self.inputs:
                    self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
            self.most = max(self.most, sum(size for _, size in self.made.values()))
        return result

    @contextmanager
    def but_in(self, module: Any, *names: str) -> Iterator[None]:
        """Within, what these functions make is not counted."""

        def unseen(function: Any) -> Any:
            def called(*arguments: Any) -> Any:
                self.looking = False
                try:
                    return function(*arguments)
                finally:
                    self.looking = True

            return called

        with patch.multiple(module, **{name: unseen(getattr(module, name)) for name in names}):
            yield


def segment_ids_of(kind: str, batch: int, seq_len: int) -> Tensor | None:
    """A segment pattern by name; "documents" and "scattered" draw from torch's generator."""
    index = torch.arange(seq_len)
    if kind == "none":
        return None
    if kind == "left":
        return torch.where(index >= min(70, seq_len - 1), 0, -1).expand(batch, -1)
    if kind == "right":
        return torch.where(index < max(1, seq_len // 2), 3, -7).expand(batch, -1)
    if kind == "all_masked":
        ids = torch.zeros(batch, seq_len, dtype=torch.long)
        ids[0] = -1
        return ids
    if kind == "one_key":
        return index.expand(batch, -1)
    if kind == "windows":
        return (index // 16).expand(batch, -1)
    if kind == "documents":
        return torch.randint(-1, 5, (batch, seq_len)).sort(-1, descending=True).values
    assert kind == "scattered", kind
    return torch.randint(-1, 4, (batch, seq_len), dtype=torch.int32)


def make_case(
    batch: int,
    heads: int,
    seq_len: int,
    head_dim: int,
    dtype: torch.dtype,
    segments: str = "none",
    key_heads: int | None = None,
    poison: bool = True,
    device: torch.device | str = "cpu",
) -> Case:
    """Random inputs, the same for every backend and device; padding is NaN in the student and inf in the teacher."""
    torch.manual_seed(seq_len * 1000 + head_dim)

    def pair(count: int) -> tuple[Tensor, Tensor]:
        student = torch.randn(batch, count, seq_len, head_dim)
        return student, student + 0.3 * torch.randn_like(student)

    student_q, teacher_q = pair(heads)
    student_k, teacher_k = pair(key_heads) if key_heads is not None else (None, None)
    row_grad = torch.randn(batch, heads, seq_len)
    segment_ids = segment_ids_of(segments, batch, seq_len)
    if segment_ids is not None and poison:
        padding = (segment_ids < 0)[:, None, :, None]
        student_q, teacher_q = _fill(student_q, padding, "nan"), _fill(teacher_q, padding, "inf")
        if student_k is not None and teacher_k is not None:
            student_k, teacher_k = _fill(student_k, padding, "nan"), _fill(teacher_k, padding, "inf")

    def place(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(device, dtype)

    return Case(
        student_q.to(device, dtype),
        teacher_q.to(device, dtype),
        place(student_k),
        place(teacher_k),
        row_grad.to(device),
        None if segment_ids is None else segment_ids.to(device),
    )


def _fill(x: Tensor, where: Tensor, value: str) -> Tensor:
    return x.masked_fill(where, float(value))


def evaluate(case: Case, backend: str, softmax_scale: float | None = None) -> Result:
    """Rows and gradients; backend "reference" is the dense version in the inputs' own dtype."""
    q = case.student_q.detach().requires_grad_()
    options = {"softmax_scale": softmax_scale, "segment_ids": case.segment_ids}
    relation: Callable[..., Tensor] = rk.reference.relation_kl
    attention: Callable[..., Tensor] = rk.reference.attention_kl
    if backend != "reference":
        relation, attention, options = rk.relation_kl, rk.attention_kl, {**options, "backend": backend}
    if case.student_k is None or case.teacher_k is None:
        rows = relation(q, case.teacher_q, **options)
        (grad,) = torch.autograd.grad(rows, q, case.row_grad.to(rows.dtype))
        return Result(rows.detach(), grad, None)
    k = case.student_k.detach().requires_grad_()
    rows = attention(q, k, case.teacher_q, case.teacher_k, **options)
    grads = torch.autograd.grad(rows, (q, k), case.row_grad.to(rows.dtype))
    return Result(rows.detach(), *grads)


def exact(case: Case, softmax_scale: float | None = None) -> Result:
    """The dense version in float64, on the very values that the case holds."""
    return evaluate(_convert(case, torch.float64), "reference", softmax_scale)


def _convert(case: Case, dtype: torch.dtype) -> Case:
    tensors = (x.to(dtype) if x is not None and x.is_floating_point() else x for x in case)
    return Case(*tensors)  # type: ignore[arg-type]


def check(case: Case, backend: str, softmax_scale: float | None = None, floor: float = 2e-7) -> None:
    """Rows and every gradient may err twice as much as the plain version in the same precision, and a little.

    Args:
        floor: that little, relative to the largest value, and to 1 where all are smaller.
    """
    got = evaluate(case, backend, softmax_scale)
    truth = exact(case, softmax_scale)
    plain = evaluate(case, "reference", softmax_scale)
    if not plain.rows.isfinite().all():
        # Plain fp16 overflows where logits pass 65504; bf16 then is the yardstick.
        assert case.student_q.dtype == torch.float16
        plain = evaluate(_convert(case, torch.bfloat16), "reference", softmax_scale)
    for name, a, b, c in zip(Result._fields, got, truth, plain, strict=True):
        if a is not None and b is not None and c is not None:
            assert_within_budget(name, a, b, c, floor)
    if case.segment_ids is not None:
        padding = (case.segment_ids < 0)[:, None].expand_as(got.rows)
        assert (got.rows[padding] == 0).all()
        assert (got.grad_q[padding] == 0).all()


def assert_within_budget(name: str, got: Tensor, truth: Tensor, plain: Tensor, floor: float) -> None:
    assert torch.isfinite(got).all(), f"{name}: {int((~torch.isfinite(got)).sum())} values are not finite"
    assert got.shape == truth.shape, f"{name}: {got.shape} instead of {truth.shape}"
    error = (got.double() - truth).abs()
    budget = (plain.double() - truth).abs()
    floor *= max(1.0, float(truth.abs().max()))
    assert float(error.max()) <= 2 * float(budget.max()) + floor, (
        f"{name}: the largest error is {float(error.max()):.2e}; the plain version's {float(budget.max()):.2e}"
    )
    assert float(error.mean()) <= 2 * float(budget.mean()) + floor, (
        f"{name}: the mean error is {float(error.mean()):.2e}; the plain version's {float(budget.mean()):.2e}"
    )
