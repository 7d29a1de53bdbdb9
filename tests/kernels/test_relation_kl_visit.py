"""Visits, in PyTorch and as kernels: rows against the keys before them and against themselves, held against the whole.

On a GPU the kernels are compiled (on Hopper, 16-bit inputs run the Hopper kernels); elsewhere Triton's interpreter runs
the general ones.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import relation_kl as rk
import torch
from relation_kl import torch_visit
from relation_kl.tiles import pick_pipeline
from relation_kl.torch_visit import State, Visit
from relation_kl_checks import LAYOUTS
from torch import Tensor

triton = pytest.importorskip("triton", reason="needs triton, which is not installed")
from relation_kl import hopper_backend, triton_visit  # noqa: E402

ON_GPU = torch.cuda.is_available()


def ids_of(kind: str, batch: int, keys: int, rows: int) -> Tensor | None:
    index = torch.arange(keys + rows).expand(batch, -1)
    if kind == "one":
        return None
    if kind == "crossing":  # one document across the border, others before and behind it
        return (index >= keys - keys // 3).long() + (index >= keys + rows // 2).long()
    if kind == "apart":  # rows see no key
        return (index >= keys).long()
    if kind == "right":
        return torch.where(index < keys + rows - 3 * torch.arange(batch)[:, None] - 2, 0, -1)
    assert kind == "documents", kind
    return torch.randint(-1, 6, (batch, keys + rows)).sort(-1).values


def ids_vary(kind: str) -> bool:
    """Whether the rows of a batch have different ids."""
    return kind in ("right", "documents")


def visited(
    visits: ModuleType,
    students: list[Tensor],
    teachers: list[Tensor],
    ids: Tensor | None,
    upstream: Tensor,
    keys: int,
    lay: Callable[[Tensor], Tensor] = Tensor.contiguous,
) -> list[Tensor]:
    """Divergence of the rows behind the first `keys` tokens, and gradients of q (of the rows) and k (of all)."""
    q_s, k_s, q_t, k_t = students[0], students[-1], teachers[0], teachers[-1]
    scale = q_s.shape[3] ** -0.5
    kind = torch.promote_types(q_s.dtype, torch.float32)

    def part(x: Tensor, of_rows: bool) -> Tensor:
        return lay(x[:, :, keys:] if of_rows else x[:, :, :keys])

    row_ids = None if ids is None else ids[:, keys:].contiguous()
    key_ids = None if ids is None else ids[:, :keys].contiguous()
    x_s, x_t, y_s, y_t = part(q_s, True), part(q_t, True), part(k_s, True), part(k_t, True)
    pivots = torch.stack([visits.own_logits(x, y, scale, row_ids) for x, y in ((x_s, y_s), (x_t, y_t))])
    state = State.start(pivots)
    both = [
        Visit(x_s, x_t, part(k_s, False), part(k_t, False), row_ids, key_ids, False),
        Visit(x_s, x_t, y_s, y_t, row_ids, row_ids, True),
    ]
    for visit in both:
        visits.forward(visit, scale, state)
    values, statistics = visits.conclude(state, row_ids)
    g = upstream.to(kind) if row_ids is None else torch.where((row_ids >= 0)[:, None], upstream.to(kind), 0.0)
    gradient, unit = visits.prepare(g, q_s.dtype, scale, None)
    inputs = [x_s, *(visit.k_s for visit in both)]
    grads = [torch.zeros(visits.gradient_shape(x), dtype=kind, device=x.device) for x in inputs]
    for visit, k_grad in zip(both, grads[1:], strict=True):
        visits.backward(visit, scale, statistics, gradient, grads[0], k_grad)
    results = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs]
    for grad, result in zip(grads, results, strict=True):
        visits.finish(grad, unit, result)
    return [values, results[0], torch.cat(results[1:], 2)]


def truth(students: list[Tensor], teachers: list[Tensor], ids: Tensor | None, upstream: Tensor, keys: int, dtype: Any):
    """The same from the dense version in a type of its own, gradients of q and k apart."""
    leaves = [students[0].to(dtype).requires_grad_(), students[-1].to(dtype).requires_grad_()]
    rows = rk.reference.attention_kl(*leaves, teachers[0].to(dtype), teachers[-1].to(dtype), segment_ids=ids)
    q_grad, k_grad = torch.autograd.grad(rows[:, :, keys:], leaves, upstream.to(rows.dtype))
    return [rows[:, :, keys:].detach(), q_grad[:, :, keys:], k_grad]


def check(
    visits: ModuleType, dtype: torch.dtype, dim: int, heads: tuple[int, ...], keys: int, rows: int, kind: str,
    device: torch.device, loud: float = 1.0, lay: Callable[[Tensor], Tensor] = Tensor.contiguous,
) -> None:  # fmt: skip
    torch.manual_seed(keys + rows)
    batch = 2 if ids_vary(kind) or ON_GPU else 1
    ids = ids_of(kind, batch, keys, rows)
    students = [torch.randn(batch, h, keys + rows, dim) * loud for h in heads]
    teachers = [x + 0.3 * torch.randn_like(x) for x in students]
    clean = [[x.to(device, dtype) for x in tensors] for tensors in (students, teachers)]
    dirty = clean
    if ids is not None:
        ids = ids.to(device)
        padding = (ids < 0)[:, None, :, None]
        dirty = [[x.masked_fill(padding, float("nan")) for x in tensors] for tensors in clean]
    upstream = torch.randn(batch, rows, heads[0], device=device).transpose(1, 2)
    got = visited(visits, dirty[0], dirty[1], ids, upstream, keys, lay)
    exact = truth(clean[0], clean[1], ids, upstream, keys, torch.float64)
    plain = truth(clean[0], clean[1], ids, upstream, keys, dtype)
    for name, a, b, c in zip(("rows", "dq", "dk"), got, plain, exact, strict=True):
        assert a.isfinite().all(), name
        error, budget = (float((x.double() - c).abs().max()) for x in (a, b))
        assert error <= 2 * budget + (1e-6 if loud == 1 else 2e-5) * max(1.0, float(c.abs().max())), (
            name,
            error,
            budget,
        )


# The interpreter is slow; a GPU does them all.
SHAPES = [(75, 40), (128, 130)] if not ON_GPU else [(1, 1), (75, 75), (129, 513), (1024, 1000)]


@pytest.mark.parametrize("kind", ["one", "crossing", "apart", "right", "documents"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch(kind: str, dtype: torch.dtype) -> None:
    for keys, rows in ((1, 1), *SHAPES):
        check(torch_visit, dtype, 16, (4, 2), keys, rows, kind, torch.device("cpu"))


@pytest.mark.parametrize("kind", ["one", "crossing", "apart", "right", "documents"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernels(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    heads = ((2,), (4, 2)) if ON_GPU else ((2, 1),)
    for keys, rows in SHAPES if ON_GPU or kind in ("one", "documents") else SHAPES[:1]:
        for each in heads:
            for dim in (64, 80, 96, 128, 256) if ON_GPU else (16,):
                check(triton_visit, dtype, dim, each, keys, rows, kind, device)


@pytest.mark.parametrize("layout", ["views", *LAYOUTS])
@pytest.mark.parametrize("visits", [torch_visit, triton_visit], ids=["torch", "triton"])
def test_chunks_may_lie_anyhow(visits: ModuleType, layout: str, device: torch.device) -> None:
    lay = LAYOUTS.get(layout, lambda x: x)
    for dtype in (torch.float32, torch.float16):
        check(visits, dtype, 128 if ON_GPU else 16, (4, 2), *SHAPES[-1], "right", device, lay=lay)


def test_what_tma_cannot_read_is_copied() -> None:
    """A chunk of some heads is not."""
    x = torch.randn(2, 4, 40, 24).bfloat16()
    view = LAYOUTS["heads in a token"](x)[:, 1:3, 20:]
    odd = [LAYOUTS[name](x)[:, 1:3, 20:] for name in ("misaligned", "every other channel")]
    visit = Visit(view, odd[0], odd[1], x[:, :2, 20:].mT.contiguous().mT, None, None, False)
    got = triton_visit._fetchable(visit)
    assert got.q_s is view
    for before, after in zip(visit[1:4], got[1:4], strict=True):
        assert torch.equal(before, after) and hopper_backend.fetchable(after) and not hopper_backend.fetchable(before)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["one", "crossing", "documents"])
def test_row_tiles_in_pieces(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that few of the multiprocessors would be left with are divided by their keys."""
    for multiprocessors in (5, 7):
        monkeypatch.setattr(hopper_backend, "multiprocessors", lambda device, number=multiprocessors: number)
        check(triton_visit, torch.bfloat16, 128, (4, 2), 700, 500, kind, torch.device("cuda"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loud_keys(dtype: torch.dtype, device: torch.device) -> None:
    """Logits far beyond the rows' own: pivots that do not bear them are given up for a running maximum."""
    check(triton_visit, dtype, 64 if ON_GPU else 16, (2, 2), 75, 75, "one", device, loud=6.0)


@pytest.mark.parametrize("dim", [64, 72, 80, 96, 128])
def test_a_gradient_in_register_order_is_brought_into_order(dim: int, device: torch.device) -> None:
    """Number by number: an accumulator's thread and register, as the layout of wgmma has them."""
    batch, heads, tokens = 2, 3, 100
    pipeline = pick_pipeline("sm_90", dim, 2)
    assert pipeline is not None
    out = torch.full((batch, tokens, heads, dim), float("nan"), dtype=torch.bfloat16, device=device).transpose(1, 2)
    grad = torch.randn(hopper_backend.gradient_shape(out, pipeline), device=device)
    token, channel = torch.arange(tokens)[:, None], torch.arange(dim)[None]
    row = token % 64
    thread = row // 16 * 32 + row % 8 * 4 + channel % 8 // 2
    number = (channel // 8 * 128 + thread) * 4 + row % 16 // 8 * 2 + channel % 2
    want = grad.flatten(2)[..., (token // 64 * 64 * pipeline.block_k + number).to(device)]
    for unit in (None, torch.tensor([3.0], device=device)):
        hopper_backend.finish(grad, 0.5, unit, pipeline, out)
        torch.testing.assert_close(out, (want * (0.5 if unit is None else 1.5)).to(out.dtype), rtol=1e-2, atol=0)


@pytest.mark.gpu
def test_deterministic_mode_is_bit_identical(device: torch.device) -> None:
    torch.manual_seed(0)
    x = [torch.randn(1, 4, 1024, 128, device=device, dtype=torch.bfloat16) for _ in range(2)]
    upstream = torch.randn(1, 4, 512, device=device)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (visited(triton_visit, x[:1], x[1:], None, upstream, 512) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
