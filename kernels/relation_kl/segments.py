"""Segments: which keys a row may see, and which key tiles a row tile must therefore visit.

One mechanism serves padding, packed documents and native-length windows: an integer `segment_ids` [B, T]. A
row sees the keys with its own id at or before it; a negative id marks padding. Rows are matched by id, so the
tokens of a segment need not be neighbours: a kernel then visits the tiles between them too, and masks them.
"""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Segments:
    """Per token, the reach of its segment; everything the kernels need, made on device without a host sync.

    Attributes:
        first: int32 [B, T], index of the segment's first token, which also names the segment; -1 for padding.
        last: int32 [B, T], index of the segment's last token; -1 for padding.
        run_start: int32 [B, T], first index of the unbroken run of this segment around the token.
        run_end: int32 [B, T], last index of that run.
    """

    first: Tensor
    last: Tensor
    run_start: Tensor
    run_end: Tensor


def locate_segments(segment_ids: Tensor) -> Segments:
    """Find where each token's segment begins and ends.

    Args:
        segment_ids: integer [B, T], negative = padding.
    """
    ids = segment_ids.long().clamp(min=-1)
    index = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    run_start, run_end = _runs(ids, index)

    # A stable sort puts the tokens of a segment side by side, in order: its ends there are its first and last
    # token.
    ordered, order = ids.sort(dim=-1, stable=True)
    begin, end = _runs(ordered, index)
    first = torch.empty_like(ids).scatter_(1, order, order.gather(1, begin))
    last = torch.empty_like(ids).scatter_(1, order, order.gather(1, end))
    padding = ids < 0
    return Segments(
        first=first.masked_fill(padding, -1).int(),
        last=last.masked_fill(padding, -1).int(),
        run_start=run_start.int(),
        run_end=run_end.int(),
    )


def _runs(ids: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """First and last index of the run of equal ids around each token, int64 [B, T]."""
    change = ids[:, 1:] != ids[:, :-1]
    edge = torch.ones_like(ids[:, :1], dtype=torch.bool)
    starts = torch.cat([edge, change], dim=1)
    ends = torch.cat([change, edge], dim=1)
    run_start = torch.where(starts, index, 0).cummax(dim=1).values
    big = ids.shape[1]
    run_end = torch.where(ends, index, big).flip(1).cummin(dim=1).values.flip(1)
    return run_start, run_end


def tile_bounds(segments: Segments, block_m: int, block_n: int) -> Tensor:
    """Which tiles a tile of rows must visit: its keys before it, and the rows after it whose key it is.

    Args:
        segments: of the sequence, tensors [B, T].
        block_m: rows a row tile; a multiple of block_n.
        block_n: tokens a visited tile.

    Returns:
        int32 [B, ceil(T / block_m), 4], token indices: with s the first row and e the end of the row tile,
        visit [lo, s) and, for the transposed side, [e, hi); within [lo_full, s) and [e, hi_full) every pair
        of tokens shares a segment and needs no mask. lo and lo_full are multiples of block_n; hi_full ends on
        one counted from e, and hi on T at most. A tile of padding only has lo = lo_full = hi_full = hi = s:
        not even its own diagonal is to be visited.
    """
    assert block_m % block_n == 0, (block_m, block_n)
    batch, seq_len = segments.first.shape
    tiles = -(-seq_len // block_m)
    valid = segments.first >= 0

    def reduce(values: Tensor, neutral: int, largest: bool) -> Tensor:
        values = torch.where(valid, values, neutral)
        values = torch.nn.functional.pad(values, (0, tiles * block_m - seq_len), value=neutral)
        values = values.view(batch, tiles, block_m)
        return values.amax(-1) if largest else values.amin(-1)

    start = torch.arange(tiles, device=valid.device, dtype=torch.int32) * block_m
    end = (start + block_m).clamp(max=seq_len)
    lo = torch.minimum(reduce(segments.first, seq_len, False) // block_n * block_n, start)
    hi = torch.maximum(reduce(segments.last, -1, True) + 1, end)
    lo_full = reduce(segments.run_start, 0, True) + (block_n - 1)
    lo_full = torch.minimum(lo_full // block_n * block_n, start)
    hi_full = reduce(segments.run_end, seq_len, False) + 1 - end
    hi_full = end + hi_full.clamp(min=0) // block_n * block_n
    hi_full = torch.minimum(hi_full, hi)

    empty = reduce(segments.first, -1, True) < 0
    bounds = torch.stack([lo, torch.maximum(lo_full, lo), hi_full, hi], dim=-1)
    return torch.where(empty[..., None], start[:, None].expand(tiles, 4), bounds).int()


def visited_pairs(bounds: Tensor, seq_len: int, block_m: int, block_n: int) -> int:
    """Number of (row, key) pairs in the tiles that a forward pass visits, to check how the work grows.

    Args:
        bounds: from `tile_bounds`.
        seq_len: T.
        block_m: as given to `tile_bounds`.
        block_n: as given to `tile_bounds`.
    """
    start = torch.arange(bounds.shape[1], device=bounds.device) * block_m
    alive = bounds[..., 3] > start
    below = (start - bounds[..., 0]).clamp(min=0)
    diagonal = (seq_len - start).clamp(max=block_m)
    diagonal = (diagonal + block_n - 1) // block_n * block_n
    return int(((below + diagonal) * alive).sum()) * block_m


def _require_rank(name: str, tensor: Tensor, rank: int) -> None:
    if tensor.dim() != rank:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must have {rank} dimensions")
