"""Segments: which keys a row may see.

One mechanism serves padding, packed documents and native-length windows: an integer `segment_ids` [B, T]. A
row sees the keys with its own id at or before it; a negative id marks padding. Rows are matched by id, so the
tokens of a segment need not be neighbours: a kernel then visits the tiles between them too, and masks them.
It visits none in vain where ids only rise, or only fall, along the sequence, as those made here from masks,
positions and lengths do.
"""

from __future__ import annotations

import torch
from torch import Tensor


def segments_from_attention_mask(attention_mask: Tensor) -> Tensor:
    """One segment a sequence; tokens with a zero mask are padding.

    Args:
        attention_mask: [B, T], integer or bool; non-zero = a real token.

    Returns:
        segment_ids, int32 [B, T]: 0 for tokens, -1 for padding.

    Raises:
        ValueError: attention_mask is not two-dimensional.
    """
    _require_rank("attention_mask", attention_mask, 2)
    return (attention_mask != 0).to(torch.int32) - 1


def segments_from_position_ids(position_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """A new segment wherever the positions do not go on by one, as they restart between packed documents.

    Args:
        position_ids: integer [B, T].
        attention_mask: [B, T] or None; tokens with a zero mask are padding.

    Returns:
        segment_ids, int32 [B, T].

    Raises:
        ValueError: the shapes are not [B, T], or differ.
    """
    _require_rank("position_ids", position_ids, 2)
    starts = torch.zeros_like(position_ids, dtype=torch.int32)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    segment_ids = starts.cumsum(-1, dtype=torch.int32)
    if attention_mask is None:
        return segment_ids
    if attention_mask.shape != position_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, position_ids "
            f"{tuple(position_ids.shape)}; they must be equal"
        )
    return torch.where(attention_mask != 0, segment_ids, -1)


def segments_from_cu_seqlens(cu_seqlens: Tensor, seq_len: int | None = None) -> Tensor:
    """Segments of a packed row from the cumulative lengths of its documents.

    Args:
        cu_seqlens: integer [n + 1], ascending from 0.
        seq_len: tokens in the row; the last of cu_seqlens by default. Tokens beyond the last document are
            padding.

    Returns:
        segment_ids, int32 [1, seq_len].

    Raises:
        ValueError: cu_seqlens is not one-dimensional or has no entry, or seq_len is shorter than the
            documents.
    """
    _require_rank("cu_seqlens", cu_seqlens, 1)
    if cu_seqlens.numel() == 0:
        raise ValueError("cu_seqlens is empty; it needs at least the leading 0")
    total = int(cu_seqlens[-1])
    if seq_len is None:
        seq_len = total
    if seq_len < total:
        raise ValueError(f"seq_len is {seq_len}, but cu_seqlens ends at {total}")
    tokens = torch.arange(seq_len, device=cu_seqlens.device)
    ids = torch.searchsorted(cu_seqlens.long().contiguous(), tokens, right=True).to(torch.int32) - 1
    return torch.where(tokens < total, ids, -1)[None]


def cut_into_windows(segment_ids: Tensor, window: int, *, offset: int = 0) -> Tensor:
    """Cut every segment at the multiples of a window length, e.g. the teacher's native length.

    Args:
        segment_ids: integer [B, T], negative = padding.
        window: tokens in a window; windows are counted from the start of the sequence.
        offset: position in the whole sequence of this tensor's first token, where it is a shard.

    Returns:
        segment_ids, int64 [B, T]: equal only where both the segment and the window are; padding stays
        negative.

    Raises:
        ValueError: window < 1 or offset < 0.
    """
    _require_rank("segment_ids", segment_ids, 2)
    if window < 1:
        raise ValueError(f"window is {window}; it must be at least 1")
    if offset < 0:
        raise ValueError(f"offset is {offset}; it must not be negative")
    number = torch.arange(segment_ids.shape[1], device=segment_ids.device) + offset
    number = number.div(window, rounding_mode="floor")
    # 2**31 windows are never reached, so (segment, window) pairs stay distinct for any int32 segment id,
    # on every shard alike.
    return torch.where(segment_ids >= 0, segment_ids.long() * 2**31 + number, -1)


def _require_rank(name: str, tensor: Tensor, rank: int) -> None:
    if tensor.dim() != rank:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must have {rank} dimensions")
