"""The frozen teacher: the student's own frozen weights (shared) or a second copy (replica), native RoPE."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn

from linearard.capture import AttentionPass, Observer
from linearard.layout import MicroBatch
from linearard.models.rope import RopeSwitch
from linearard.models.student import adapters_disabled


class Teacher:
    """Runs the teacher's forward pass on a micro-batch's windows."""

    def __init__(self, module: nn.Module, ulysses: Any, shared_rope: RopeSwitch | None) -> None:
        """
        Args:
            module: what is called: the student's module (shared) or the replica's.
            ulysses: sequence parallelism for windows that span shards; None at size 1.
            shared_rope: the student's RoPE switch where the module is the student's, None for a replica.
        """
        self._module = module
        self._ulysses = ulysses
        self._rope = shared_rope

    @torch.no_grad()
    def forward(self, batch: MicroBatch, observer: Observer, want_logits: bool) -> torch.Tensor | None:
        """Runs the pass; `observer` sees each layer.

        Returns:
            Logits [B, N, V] if wanted, else None.
        """
        attention_pass = AttentionPass(
            segments=batch.teacher_segments,
            ulysses=None if batch.local_windows else self._ulysses,
            observer=observer,
            observe_shards=batch.observe_shards,
        )
        module = self._module
        was_training = module.training
        with contextlib.ExitStack() as stack:
            if self._rope is not None:
                stack.enter_context(self._rope.native())
                stack.enter_context(adapters_disabled(module))
            module.eval()  # no dropout, no checkpointing
            stack.callback(module.train, was_training)
            output = module(
                input_ids=batch.teacher_input_ids,
                position_ids=batch.teacher_position_ids,
                use_cache=False,
                logits_to_keep=0 if want_logits else 1,
                attention_pass=attention_pass,
            )
        return output.logits.reshape(*batch.input_ids.shape, -1) if want_logits else None
