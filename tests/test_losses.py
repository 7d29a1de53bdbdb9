"""Chunked losses against plain ones, and the sums of relations that the step divides once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from relation_kl import reference

from linearard.head_loss import TokenTerms, chunk_tokens, token_loss, token_loss_of_adapted_head
from linearard.losses import RelationLoss, per_layer_table
from linearard.teacher_tensors import OffloadedTensors, TeacherTensors


def _logits(seed: int, rows: int = 2, length: int = 13, vocabulary: int = 17) -> torch.Tensor:
    return 3 * torch.randn(rows, length, vocabulary, generator=torch.Generator().manual_seed(seed))


def _labels() -> torch.Tensor:
    labels = torch.randint(0, 17, (2, 13), generator=torch.Generator().manual_seed(9))
    labels[0, :3] = -100
    labels[1, 7] = -100
    labels[1, -1] = -100
    return labels


def _both(chunk: int, hidden: torch.Tensor, teacher: torch.Tensor | None, factors: tuple[float, float]) -> Any:
    """Loss and sums where the head is the identity: hidden states are logits."""
    terms = TokenTerms(_labels(), *factors, teacher, chunk)
    return token_loss(hidden, lambda x: x, [], terms, lambda x: x)


@pytest.mark.parametrize("chunk", [1, 5, 26, 2048])
def test_next_token_loss_does_not_depend_on_the_chunk(chunk: int) -> None:
    labels, logits = _labels(), _logits(0).requires_grad_()
    value, sums = _both(chunk, logits, None, (0.5, 0.0))
    (3 * value).backward()
    plain = _logits(0).double().requires_grad_()
    expected = sum(
        -F.log_softmax(plain[b, i], -1)[labels[b, i]] for b in range(2) for i in range(13) if labels[b, i] >= 0
    )
    expected.backward()
    assert value.dtype == torch.float32
    assert 2 * value.item() == pytest.approx(expected.item(), rel=1e-6)
    assert sums.tolist() == pytest.approx([expected.item(), 0], rel=1e-6)
    assert torch.allclose(logits.grad.double(), 1.5 * plain.grad, atol=1e-6)
    assert logits.grad[0, 0].abs().max() == 0  # no label, no gradient


@pytest.mark.parametrize("chunk", [1, 5, 26, 2048])
def test_logits_kl_does_not_depend_on_the_chunk(chunk: int) -> None:
    labels, student, teacher = _labels(), _logits(1).requires_grad_(), _logits(2)
    value, sums = _both(chunk, student, teacher, (0.0, 1.0))
    plain = _logits(1).double().requires_grad_()
    p, log_q = F.softmax(_logits(2).double(), -1), F.log_softmax(plain, -1)
    rows = (p * (p.log() - log_q)).sum(-1)
    expected = rows[labels >= 0].sum()
    (of_student,) = torch.autograd.grad(value, student)
    (of_plain,) = torch.autograd.grad(expected, plain)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    assert sums.tolist() == pytest.approx([0, expected.item()], rel=1e-6)
    assert torch.allclose(of_student.double(), of_plain, atol=1e-6)
    assert _both(chunk, _logits(1).requires_grad_(), _logits(1), (0.0, 1.0))[0].item() == 0


@pytest.mark.parametrize("chunk", [4, 2048])
def test_a_trained_head_gets_its_gradient(chunk: int) -> None:
    """Both terms over a linear head with a bias, its weight and bias trained."""
    generator, labels = torch.Generator().manual_seed(3), _labels()
    hidden, theirs = (torch.randn(2, 13, 6, generator=generator) for _ in range(2))
    head = torch.nn.Linear(6, 17)
    leaf = hidden.clone().requires_grad_()
    terms = TokenTerms(labels, 0.4, 0.2, theirs, chunk)
    value, sums = token_loss(leaf, head, list(head.parameters()), terms, head)
    found = torch.autograd.grad(value, (leaf, head.weight, head.bias))
    again, sums_again = token_loss_of_adapted_head(leaf, head, terms, head)
    found_again = torch.autograd.grad(again, (leaf, head.weight, head.bias))
    weight, bias = (p.detach().double().requires_grad_() for p in (head.weight, head.bias))
    double = hidden.double().requires_grad_()
    log_s = F.log_softmax(F.linear(double, weight, bias), -1)
    log_t = F.log_softmax(F.linear(theirs.double(), weight.detach(), bias.detach()), -1)
    next_token = F.nll_loss(log_s.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    kl = ((log_t.exp() * (log_t - log_s)).sum(-1) * (labels >= 0)).sum()
    expected = torch.autograd.grad(0.4 * next_token + 0.2 * kl, (double, weight, bias))
    assert sums.tolist() == sums_again.tolist() == pytest.approx([next_token.item(), kl.item()], rel=1e-6)
    for a, b in zip((*found, *found_again), (*expected, *expected), strict=True):
        assert a.dtype == torch.float32 and torch.allclose(a.double(), b, atol=2e-6)


def test_bf16_logits_are_summed_in_fp32() -> None:
    labels, logits = _labels(), _logits(3).bfloat16()
    expected = F.cross_entropy(logits.double().flatten(0, 1), labels.flatten(), reduction="sum")
    assert _both(4, logits.requires_grad_(), None, (1.0, 0.0))[0].item() == pytest.approx(expected.item(), rel=1e-6)


def test_no_labels_give_zero() -> None:
    logits = _logits(0).requires_grad_()
    terms = TokenTerms(torch.full((2, 13), -100), 1.0, 1.0, _logits(1), 5)
    value, sums = token_loss(logits, lambda x: x, [], terms, lambda x: x)
    value.backward()
    assert value.item() == 0 and sums.abs().sum() == 0 and logits.grad.abs().max() == 0


def test_chunks_hold_a_bounded_number_of_logits() -> None:
    assert chunk_tokens(32_000) == 1024 and chunk_tokens(128_256) == 256 and chunk_tokens(2**30) == 1


class _Layer:
    """q, k, v of 4 and 2 heads, student and teacher, of one layer."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(heads: int) -> torch.Tensor:
            return torch.randn(2, heads, 11, 8, generator=generator)

        self.student = [draw(4).requires_grad_(), draw(2).requires_grad_(), draw(2).requires_grad_()]
        self.teacher = [draw(4), draw(2), draw(2)]


def test_relation_gradient_is_added_in_backward_and_counted_once() -> None:
    """Two layers of three, four relations: sums, means and gradients against the dense reference."""
    weights, chosen, scale = {"qq": 1.0, "kk": 0.5, "vv": 2.0, "qk": 0.3}, (0, 2), 0.35
    segments = torch.tensor([[0] * 5 + [1] * 6, [0] * 8 + [-1] * 3], dtype=torch.int32)
    rows, layers = int((segments >= 0).sum()), [_Layer(seed) for seed in range(3)]
    loss = RelationLoss(weights, chosen, 4, 2)
    teacher = TeacherTensors(weights, chosen)
    for number, layer in enumerate(layers):
        same = teacher.observe(number, *layer.teacher, scale)
        assert all(a is b for a, b in zip(same, layer.teacher, strict=True))
    observe = loss.observer(teacher, segments, rows, gradient_scale=3.0)
    assert loss.stacked_sums(torch.device("cpu")).abs().sum() == 0
    upstream = [[torch.full_like(x, 0.01) for x in layer.student] for layer in layers]
    for number, layer in enumerate(layers):
        outputs = observe(number, *layer.student, scale)
        assert all(torch.equal(a, b) for a, b in zip(outputs, layer.student, strict=True))
        torch.autograd.backward(outputs, upstream[number])
    assert teacher.held == ()
    means, per_layer = loss.means(loss.stacked_sums(torch.device("cpu")), rows)

    total = torch.zeros((), dtype=torch.float64)
    expected: dict[str, list[float]] = {name: [] for name in weights}
    doubles = [[x.detach().double().requires_grad_() for x in layer.student] for layer in layers]
    for number in chosen:
        (q, k, v), (tq, tk, tv) = doubles[number], (x.double() for x in layers[number].teacher)
        values = {
            "qq": reference.relation_kl(q, tq, softmax_scale=scale, segment_ids=segments),
            "kk": reference.relation_kl(k, tk, softmax_scale=scale, segment_ids=segments),
            "vv": reference.relation_kl(v, tv, softmax_scale=scale, segment_ids=segments),
            "qk": reference.attention_kl(q, k, tq, tk, softmax_scale=scale, segment_ids=segments),
        }
        for name, value in values.items():
            mean = value.sum() / (value.shape[1] * rows)  # each relation by its own number of heads
            expected[name].append(mean.item())
            total = total + weights[name] * mean / len(chosen)
    total.backward()
    for name in weights:
        assert per_layer[name] == pytest.approx(expected[name], rel=1e-5)
        assert means[name] == pytest.approx(sum(expected[name]) / 2, rel=1e-5)
    for number, layer in enumerate(layers):
        for x, y in zip(layer.student, doubles[number], strict=True):
            own = 3.0 * y.grad if number in chosen else torch.zeros_like(y)
            assert torch.allclose(x.grad.double(), own + 0.01, atol=1e-6), number
    table = per_layer_table(chosen, per_layer)
    assert table["qk"] == {0: per_layer["qk"][0], 2: per_layer["qk"][1]}
    loss.reset()
    assert loss.stacked_sums(torch.device("cpu")).abs().sum() == 0


def test_nothing_is_observed_without_gradient() -> None:
    layer = _Layer(0)
    teacher = TeacherTensors({"qq": 1.0}, (0,))
    teacher.observe(0, *layer.teacher, 0.35)
    loss = RelationLoss({"qq": 1.0}, (0,), 4, 2, 1.0)
    with torch.no_grad():
        outputs = loss.observer(teacher, torch.zeros(2, 11, dtype=torch.int32), 22, 1.0)(0, *layer.student, 0.35)
    assert outputs[0] is layer.student[0] and not loss.sums


@pytest.mark.parametrize("offload", [False, True])
def test_teacher_windows_are_joined_to_rows(offload: bool) -> None:
    """Windows that were the teacher's batch become neighbours again; only the letters in use are kept, until taken."""
    q = torch.randn(6, 4, 5, 8)  # 2 rows of 3 windows of 5 tokens
    weights, layers = {"qq": 1.0, "qk": 1.0}, (1, 2, 3)
    teacher = OffloadedTensors(weights, layers, q.device) if offload else TeacherTensors(weights, layers)
    teacher.begin(windows_per_row=3)
    for layer in range(5):
        teacher.observe(layer, layer * q, q[:, :2], q[:, :2], 1.0)
    assert teacher.held == (1, 2, 3)
    teacher.prefetch()
    for layer in (3, 2, 1):  # as a backward pass comes to them
        tensors = teacher.take(layer)
        assert sorted(tensors) == ["k", "q"] and teacher.held == tuple(range(1, layer))
        joined = tensors["q"]
        assert joined.shape == (2, 4, 15, 8)
        for row in range(2):
            for window in range(3):
                assert torch.equal(joined[row, :, window * 5 : window * 5 + 5], layer * q[row * 3 + window])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_offloaded_tensors_come_back_however_far_the_host_runs_ahead() -> None:
    device, shape, layers = torch.device("cuda"), (1, 4, 1024, 1024), tuple(range(8))
    tensors, found, expected = OffloadedTensors({"qk": 1.0, "vv": 1.0}, layers, device), [], []
    for step in range(3):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        tensors.begin()
        for layer in layers:
            if step:  # computation is behind the copies, and in the first step ahead of them
                torch.cuda._sleep(10**7)
            numbers = [100.0 * step + 3 * layer + i for i in range(3)]
            tensors.observe(layer, *(torch.full(shape, number, device=device) for number in numbers), 1.0)
            expected += numbers
        tensors.prefetch()
        for layer in reversed(layers):
            theirs = tensors.take(layer)
            torch.cuda._sleep(10**7)
            found += [(layer, step, torch.stack(theirs[name].aminmax())) for name in "qkv"]
            del theirs
        assert torch.cuda.max_memory_allocated() - before < 10 * 4 * 2**22, "more than three layers at a time"
    in_order = sorted(found, key=lambda each: (each[1], each[0]))
    assert [each[2].tolist() for each in in_order] == [[number, number] for number in expected]
