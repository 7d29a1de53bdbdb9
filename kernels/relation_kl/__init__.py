"""Row-wise KL divergence between the relations of a student and of a teacher, in memory linear in length.

Two public functions, `relation_kl` (self-relations: Q.Q, K.K, V.V) and `attention_kl` (the attention
distribution, with grouped-query mapping); for each, a `..._value_and_grad` form for callers that know the
upstream gradient beforehand. `relation_kl.reference` is the dense version that everything is tested against.
"""

from . import reference
from .functional import attention_kl, attention_kl_value_and_grad, relation_kl, relation_kl_value_and_grad
from .segments import (
    cut_into_windows,
    segments_from_attention_mask,
    segments_from_cu_seqlens,
    segments_from_position_ids,
)
from .sequence_parallel import nccl_options

__all__ = [
    "attention_kl",
    "attention_kl_value_and_grad",
    "cut_into_windows",
    "nccl_options",
    "reference",
    "relation_kl",
    "relation_kl_value_and_grad",
    "segments_from_attention_mask",
    "segments_from_cu_seqlens",
    "segments_from_position_ids",
]
