"""Every refusal is a ValueError that names the argument and its value."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import relation_kl as rk
import torch
import torch.distributed as dist
from relation_kl import functional

X = torch.randn(2, 4, 8, 16)
K = torch.randn(2, 2, 8, 16)
IDS = torch.zeros(2, 8, dtype=torch.long)


@pytest.mark.parametrize(
    ("student", "teacher", "options", "message"),
    [
        (X[0], X[0], {}, r"student has shape \(4, 8, 16\)"),
        (X[:, :, :0], X[:, :, :0], {}, r"student has shape \(2, 4, 0, 16\)"),
        (X[..., :12], X[..., :12], {}, "student has head_dim 12"),
        (torch.zeros(1, 1, 2, 264), torch.zeros(1, 1, 2, 264), {}, "student has head_dim 264"),
        (X.long(), X.long(), {}, "student is torch.int64"),
        (X, X[:, :2], {}, r"teacher has shape \(2, 2, 8, 16\), student \(2, 4, 8, 16\)"),
        (X, X.bfloat16(), {}, "teacher is torch.bfloat16, student is torch.float32"),
        (X, X.to("meta"), {}, "teacher is on meta, student on cpu"),
        (X, X, {"segment_ids": IDS[:1]}, r"segment_ids has shape \(1, 8\)"),
        (X, X, {"segment_ids": IDS.float()}, "segment_ids is torch.float32"),
        (X, X, {"segment_ids": IDS.bool()}, "segment_ids is torch.bool"),
        (X, X, {"segment_ids": IDS.to("meta")}, "segment_ids is on meta"),
        (X, X, {"softmax_scale": float("nan")}, "softmax_scale is nan"),
        (X, X, {"backend": "cuda"}, "backend is 'cuda'"),
        (
            X.double(),
            X.double(),
            {"backend": "triton"},
            r"backend is 'triton', but the .* (on cpu|torch.float64)",
        ),
    ],
)
def test_relation_kl(student: torch.Tensor, teacher: torch.Tensor, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rk.relation_kl(student, teacher, **options)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ((X, K[:, :, :4], X, K), r"student_k has shape \(2, 2, 4, 16\)"),
        ((X[:, :3], K, X[:, :3], K), r"student_k has shape .* must be a multiple"),
        ((X, K.half(), X, K), "student_k is torch.float16, student_q is torch.float32"),
        ((X, K, X[:, :2], K), "teacher_q has shape"),
        ((X, K, X, X), "teacher_k has shape"),
        ((X, K, X, K.half()), "teacher_k is torch.float16"),
    ],
)
def test_attention_kl(tensors: tuple[torch.Tensor, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rk.attention_kl(*tensors)


def test_row_grad() -> None:
    with pytest.raises(ValueError, match=r"row_grad has shape \(2, 4\)"):
        rk.relation_kl_value_and_grad(X, X, torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"row_grad is torch\.int64"):
        rk.attention_kl_value_and_grad(X, K, X, K, torch.ones(2, 4, 8, dtype=torch.long))


def test_group_must_be_a_process_group() -> None:
    with pytest.raises(ValueError, match=r"group is .*process group"):
        rk.relation_kl(X, X, group=object())


@pytest.mark.parametrize("share", [(2, 2), (-1, 2), (0, 0), (0,), [0, 1], (0.0, 1), 1])
def test_row_share(share: object) -> None:
    with pytest.raises(ValueError, match=r"row_share is .*0 <= index < count"):
        rk.relation_kl(X, X, row_share=share)  # type: ignore[arg-type]


def test_row_share_and_group_exclude_each_other(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match=r"row_share is \(0, 2\) and a group is given"):
            rk.relation_kl_value_and_grad(X, X, X[..., 0], row_share=(0, 2), group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional.importlib.util, "find_spec", lambda name: None)
    assert rk.relation_kl(X, X).sum() == 0
    with pytest.raises(ValueError, match="triton is not installed"):
        rk.relation_kl(X, X, backend="triton")


def test_importing_the_package_imports_no_triton() -> None:
    code = "import relation_kl, sys; sys.exit('triton' in sys.modules)"
    root = rk.__path__[0] + "/.."
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
