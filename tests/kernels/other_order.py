"""`torch_visit` with gradients in buffers of another shape and order, as the Hopper kernels have them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

import torch
from relation_kl import torch_visit
from relation_kl.torch_visit import Visit
from torch import Tensor

_BLOCK = 4  # tokens, the innermost dimension; a block's last ones may not exist, and hold NaN


def _packed(x: Tensor) -> Tensor:
    missing = -x.shape[2] % _BLOCK
    x = torch.cat([x, x.new_full((*x.shape[:2], missing, x.shape[3]), float("nan"))], 2)
    return x.unflatten(2, (-1, _BLOCK)).mT.flatten(2, 3)


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(_packed(x).shape)


@contextmanager
def gradients_in_another_order() -> Iterator[None]:
    """Within, who takes `torch_visit`'s buffers for anything but what they are fails."""
    plain_backward, plain_finish = torch_visit.backward, torch_visit.finish

    def backward(
        visit: Visit, scale: float, statistics: Sequence[Tensor], row_grad: Tensor, q_grad: Tensor, k_grad: Tensor
    ) -> None:
        assert q_grad.shape == _shape(visit.q_s) and k_grad.shape == _shape(visit.k_s)
        of_rows = torch.zeros_like(visit.q_s, dtype=q_grad.dtype)
        of_keys = of_rows if k_grad is q_grad else torch.zeros_like(visit.k_s, dtype=k_grad.dtype)
        plain_backward(visit, scale, statistics, row_grad, of_rows, of_keys)
        q_grad += _packed(of_rows)
        if k_grad is not q_grad:
            k_grad += _packed(of_keys)

    def finish(grad: Tensor, unit: Tensor | None, out: Tensor) -> None:
        assert grad.shape == _shape(out)
        tokens = grad.unflatten(2, (-1, out.shape[3])).mT.flatten(2, 3)[:, :, : out.shape[2]]
        plain_finish(tokens, unit, out)

    with patch.multiple(torch_visit, gradient_shape=_shape, backward=backward, finish=finish):
        yield
