"""The public functions: argument checks, choice of the backend, autograd."""

from __future__ import annotations

import importlib.util
import math
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import peer_memory, torch_backend, torch_visit
from .peer_parallel import PeerParallel
from .row_share import RowShare
from .sequence_parallel import SequenceParallel
from .torch_backend import Operands

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BACKENDS = ("auto", "torch", "triton")
_Backend = ModuleType | SequenceParallel | PeerParallel | RowShare


def relation_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    softmax_scale: float | None = None,
    segment_ids: Tensor | None = None,
    group: Any = None,
    row_share: tuple[int, int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """KL divergence from the student's to the teacher's causal self-relation, row by row.

        S_ij = softmax_scale * x_i . x_j,  j <= i, same segment;   P_i = softmax_j(S_ij)
        KL_i = sum_j Pt_ij * (log Pt_ij - log Ps_ij)

    Memory beyond inputs and outputs is O(B*H*T). Equal student and teacher give exactly 0, and a gradient of
    exactly 0.

    Args:
        student: [B, H, T, D], float32, bfloat16 or float16 (float64 too on the torch backend); D a multiple
            of 8 up to 256. Any strides. The result is differentiable with respect to it, once.
        teacher: as student, same dtype; a constant, whether or not it requires a gradient.
        softmax_scale: factor of the logits; D**-0.5 by default.
        segment_ids: integer [B, T]: a row sees the keys with its own id, at or before it. Rows with a
            negative id are padding: they give 0, get a gradient of 0 and take no part, whatever they hold.
            None = one segment. The tokens of a segment need not be neighbours, nor the ids in order, but only
            where ids rise or fall along the sequence does the Triton backend visit no tile in vain.
        group: torch process group over which the sequence is sharded contiguously, in the order of its ranks;
            T, equal on all, is then the local length, and segment_ids the local shard of a numbering of the whole;
            lengths that differ are refused, but on GPUs only where segment_ids are given, as all ranks or none must.
            Each rank gets its own rows; gradients are those of the sum over all ranks. A collective call: it waits
            for the other ranks (and the device, where segment_ids are given). Where no segment reaches beyond its
            shard, nothing is exchanged but the ranges of the ids. An NCCL group whose GPUs reach one another's memory
            keeps a piece of each one's for as long as it is there, and CUDA graphs (README.md); another rank's failure
            is a CUDA error then, which is for good. None = the whole sequence is here.
        row_share: (index, count): compute share `index` of `count` of the rows, for processes that hold the same
            sequences and heads and divide their rows; not with group. Other rows are 0, and their upstream gradient is
            ignored. Rows and gradients of all shares add up to those of the whole; all shares have as much to do.
            None = all rows.
        backend: "triton" (CUDA, or CPU under TRITON_INTERPRET=1), "torch" (any device; reads segment_ids on
            the host) or "auto": triton on CUDA where it can be imported, else torch. On Hopper GPUs 16-bit
            inputs have kernels of their own. Up to 128 channels their gradients differ in the last bits from run to
            run, unless `torch.use_deterministic_algorithms(True)` is set; inputs that TMA cannot read (see README.md)
            take the general, slower ones.

    Returns:
        [B, H, T], float32 (float64 for float64 inputs), nats, >= 0 up to rounding. It takes any upstream
        gradient, strided and expanded ones included.

    Raises:
        ValueError: an argument does not fit; the message names it.
        RuntimeError: another rank of group failed, or did not come within the group's time-out.
    """
    scale = _check_relation(student, teacher, softmax_scale, segment_ids, group)
    module = _choose_backend(backend, student, group, row_share)
    return _RelationKL.apply(student, teacher.detach(), segment_ids, scale, module)


def attention_kl(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    *,
    softmax_scale: float | None = None,
    segment_ids: Tensor | None = None,
    group: Any = None,
    backend: str = "auto",
) -> Tensor:
    """KL divergence from the student's to the teacher's causal attention distribution, row by row.

    As `relation_kl`, with S_ij = softmax_scale * q_i . k_j.

    Args:
        student_q: [B, H, T, D], see `relation_kl`. May be the same tensor as student_k: the gradients add up.
        student_k: [B, Hkv, T, D] with H % Hkv == 0; query head h uses key head h // (H / Hkv).
        teacher_q: as student_q; a constant.
        teacher_k: as student_k; a constant.
        softmax_scale: as in `relation_kl`.
        segment_ids: as in `relation_kl`.
        group: as in `relation_kl`.
        backend: as in `relation_kl`.

    Returns:
        [B, H, T], as `relation_kl`; differentiable once with respect to student_q and student_k.

    Raises:
        ValueError: an argument does not fit; the message names it.
        RuntimeError: another rank of group failed, or did not come within the group's time-out.
    """
    scale = _check_attention(student_q, student_k, teacher_q, teacher_k, softmax_scale, segment_ids, group)
    module = _choose_backend(backend, student_q, group)
    return _AttentionKL.apply(student_q, student_k, teacher_q.detach(), teacher_k.detach(), segment_ids, scale, module)


def relation_kl_value_and_grad(
    student: Tensor,
    teacher: Tensor,
    row_grad: Tensor,
    *,
    softmax_scale: float | None = None,
    segment_ids: Tensor | None = None,
    group: Any = None,
    row_share: tuple[int, int] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`relation_kl` and its gradient at once, for an upstream gradient that is known beforehand.

    The same as a forward followed by a backward, outside autograd. The torch backend computes the logits and
    the exponentials once instead of twice.

    Args:
        student: as in `relation_kl`.
        teacher: as in `relation_kl`.
        row_grad: [B, H, T], float: the upstream gradient of each row.
        softmax_scale: as in `relation_kl`.
        segment_ids: as in `relation_kl`.
        group: as in `relation_kl`.
        row_share: as in `relation_kl`.
        backend: as in `relation_kl`.

    Returns:
        (rows [B, H, T] as `relation_kl`, gradient of student [B, H, T, D] in its dtype), without autograd
        history.

    Raises:
        ValueError: an argument does not fit; the message names it.
        RuntimeError: another rank of group failed, or did not come within the group's time-out.
    """
    scale = _check_relation(student, teacher, softmax_scale, segment_ids, group)
    _check_row_grad(row_grad, student)
    operands = Operands(student.detach(), student.detach(), teacher.detach(), teacher.detach(), True)
    module = _choose_backend(backend, student, group, row_share)
    rows, grad, _ = module.value_and_grad(operands, scale, segment_ids, row_grad.detach())
    return rows, grad


def attention_kl_value_and_grad(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    row_grad: Tensor,
    *,
    softmax_scale: float | None = None,
    segment_ids: Tensor | None = None,
    group: Any = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`attention_kl` and its gradients at once, see `relation_kl_value_and_grad`.

    Args:
        student_q: as in `attention_kl`.
        student_k: as in `attention_kl`.
        teacher_q: as in `attention_kl`.
        teacher_k: as in `attention_kl`.
        row_grad: [B, H, T], float: the upstream gradient of each row.
        softmax_scale: as in `relation_kl`.
        segment_ids: as in `relation_kl`.
        group: as in `relation_kl`.
        backend: as in `relation_kl`.

    Returns:
        (rows [B, H, T], gradient of student_q [B, H, T, D], gradient of student_k [B, Hkv, T, D]).

    Raises:
        ValueError: an argument does not fit; the message names it.
        RuntimeError: another rank of group failed, or did not come within the group's time-out.
    """
    scale = _check_attention(student_q, student_k, teacher_q, teacher_k, softmax_scale, segment_ids, group)
    _check_row_grad(row_grad, student_q)
    operands = Operands(student_q.detach(), student_k.detach(), teacher_q.detach(), teacher_k.detach(), False)
    module = _choose_backend(backend, student_q, group)
    rows, grad_q, grad_k = module.value_and_grad(operands, scale, segment_ids, row_grad.detach())
    assert grad_k is not None
    return rows, grad_q, grad_k


class _RelationKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        segment_ids: Tensor | None,
        softmax_scale: float,
        module: _Backend,
    ) -> Tensor:
        operands = Operands(student, student, teacher, teacher, True)
        rows, statistics = module.forward(operands, softmax_scale, segment_ids)
        ctx.save_for_backward(student, teacher, segment_ids, *statistics)
        ctx.softmax_scale, ctx.module = softmax_scale, module
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, row_grad: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return (None,) * 5
        student, teacher, segment_ids, *statistics = ctx.saved_tensors
        operands = Operands(student, student, teacher, teacher, True)
        grad, _ = ctx.module.backward(operands, ctx.softmax_scale, segment_ids, statistics, row_grad)
        return grad, None, None, None, None


class _AttentionKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_q: Tensor,
        student_k: Tensor,
        teacher_q: Tensor,
        teacher_k: Tensor,
        segment_ids: Tensor | None,
        softmax_scale: float,
        module: _Backend,
    ) -> Tensor:
        operands = Operands(student_q, student_k, teacher_q, teacher_k, False)
        rows, statistics = module.forward(operands, softmax_scale, segment_ids)
        ctx.save_for_backward(student_q, student_k, teacher_q, teacher_k, segment_ids, *statistics)
        ctx.softmax_scale, ctx.module = softmax_scale, module
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, row_grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, segment_ids = ctx.saved_tensors[:5]
        operands = Operands(*tensors, self_relation=False)
        grad_q, grad_k = ctx.module.backward(operands, ctx.softmax_scale, segment_ids, ctx.saved_tensors[5:], row_grad)
        return grad_q, grad_k, None, None, None, None, None


def _choose_backend(backend: str, student: Tensor, group: Any, row_share: tuple[int, int] | None = None) -> _Backend:
    """What computes: it has forward, backward and value_and_grad, with the same signatures for every backend."""
    module = _choose_module(backend, student)
    _check_row_share(row_share, group)
    whole = row_share is None or row_share[1] == 1
    if whole and (group is None or dist.get_world_size(group) == 1):
        return module
    if module is torch_backend:
        visits = torch_visit
    else:
        from . import triton_visit as visits

    if row_share is not None:
        return RowShare(*row_share, visits)
    reach = peer_memory.of_group(group, student.device)
    return SequenceParallel(group, module, visits) if reach is None else PeerParallel(reach, module, visits)


def _choose_module(backend: str, student: Tensor) -> ModuleType:
    if backend not in _BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(map(repr, _BACKENDS))}")
    if backend == "auto":
        on_gpu = student.is_cuda and student.dtype in _DTYPES
        backend = "triton" if on_gpu and importlib.util.find_spec("triton") is not None else "torch"
    if backend == "torch":
        return torch_backend
    if importlib.util.find_spec("triton") is None:
        raise ValueError("backend is 'triton', but triton is not installed; use 'torch' or 'auto'")
    # Imported only here: torch's CPU builds come without triton.
    from . import triton_backend

    if not student.is_cuda and not triton_backend.INTERPRETING:
        raise ValueError(
            f"backend is 'triton', but the tensors are on {student.device}; it needs CUDA, or "
            "TRITON_INTERPRET=1 set before triton is imported"
        )
    if student.dtype not in _DTYPES:
        raise ValueError(f"backend is 'triton', but the inputs are {student.dtype}; it takes {_names(_DTYPES)}")
    return triton_backend


def _check_relation(
    student: Tensor, teacher: Tensor, softmax_scale: float | None, segment_ids: Tensor | None, group: Any
) -> float:
    _check_operand("student", student)
    _check_like("teacher", teacher, "student", student)
    return _check_common(student, softmax_scale, segment_ids, group)


def _check_attention(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    softmax_scale: float | None,
    segment_ids: Tensor | None,
    group: Any,
) -> float:
    _check_operand("student_q", student_q)
    _check_operand("student_k", student_k)
    q, k = student_q.shape, student_k.shape
    if (q[0], q[2], q[3]) != (k[0], k[2], k[3]) or q[1] % k[1] != 0:
        raise ValueError(
            f"student_k has shape {tuple(k)}, student_q {tuple(q)}; they may differ in the heads only, and "
            "the heads of student_q must be a multiple of those of student_k"
        )
    _check_type("student_k", student_k, "student_q", student_q)
    _check_like("teacher_q", teacher_q, "student_q", student_q)
    _check_like("teacher_k", teacher_k, "student_k", student_k)
    return _check_common(student_q, softmax_scale, segment_ids, group)


def _check_operand(name: str, x: Tensor) -> None:
    if x.dim() != 4 or 0 in x.shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be [B, H, T, D], none of them 0")
    if x.shape[3] % 8 != 0 or x.shape[3] > 256:
        raise ValueError(f"{name} has head_dim {x.shape[3]}; it must be a multiple of 8, 256 at most")
    if x.dtype not in (*_DTYPES, torch.float64):
        raise ValueError(f"{name} is {x.dtype}; it must be one of {_names(_DTYPES)}")


def _check_like(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.shape != other.shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, {other_name} {tuple(other.shape)}; they must be equal")
    _check_type(name, x, other_name, other)


def _check_type(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.dtype != other.dtype:
        raise ValueError(f"{name} is {x.dtype}, {other_name} is {other.dtype}; they must be equal")
    if x.device != other.device:
        raise ValueError(f"{name} is on {x.device}, {other_name} on {other.device}; they must be equal")


def _check_common(student: Tensor, softmax_scale: float | None, segment_ids: Tensor | None, group: Any) -> float:
    """Returns the softmax scale."""
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"group is {group!r}; it must be a torch process group that this process is in, or None")
    if segment_ids is not None:
        expected = (student.shape[0], student.shape[2])
        if tuple(segment_ids.shape) != expected:
            raise ValueError(f"segment_ids has shape {tuple(segment_ids.shape)}; it must be [B, T] = {list(expected)}")
        if segment_ids.is_floating_point() or segment_ids.is_complex() or segment_ids.dtype == torch.bool:
            raise ValueError(f"segment_ids is {segment_ids.dtype}; it must be an integer type")
        if segment_ids.device != student.device:
            raise ValueError(f"segment_ids is on {segment_ids.device}, the student on {student.device}")
    if softmax_scale is None:
        return float(student.shape[3] ** -0.5)
    if not math.isfinite(softmax_scale):
        raise ValueError(f"softmax_scale is {softmax_scale}; it must be finite")
    return float(softmax_scale)


def _check_row_share(row_share: tuple[int, int] | None, group: Any) -> None:
    if row_share is None:
        return
    pair = isinstance(row_share, tuple) and len(row_share) == 2 and all(isinstance(i, int) for i in row_share)
    if not pair or not 0 <= row_share[0] < row_share[1]:
        raise ValueError(f"row_share is {row_share!r}; it must be (index, count), integers with 0 <= index < count")
    if group is not None:
        raise ValueError(f"row_share is {row_share!r} and a group is given; only one of them may be")


def _check_row_grad(row_grad: Tensor, student: Tensor) -> None:
    if row_grad.shape != student.shape[:3]:
        raise ValueError(
            f"row_grad has shape {tuple(row_grad.shape)}; it must be [B, H, T] = {list(student.shape[:3])}"
        )
    if not row_grad.is_floating_point() or row_grad.device != student.device:
        raise ValueError(
            f"row_grad is {row_grad.dtype} on {row_grad.device}; it must be floating point on {student.device}"
        )


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)
