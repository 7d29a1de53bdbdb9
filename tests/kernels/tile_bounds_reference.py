"""The tightest tile bounds, read off the T x T table of which token shares a segment with which."""

from __future__ import annotations

import torch
from torch import Tensor


def related(segment_ids: Tensor) -> Tensor:
    """bool [B, T, T]: whether two tokens share a segment; padding shares one with nobody."""
    return (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids >= 0)[:, :, None]


def tile_bounds(segment_ids: Tensor, block_m: int, block_n: int) -> Tensor:
    """lo, lo_full, hi_full and hi of `segment_kernels.tile_bounds` at best, int32 [B, ceil(T / block_m), 4]."""
    seq_len = segment_ids.shape[1]
    bounds = [
        [_bounds(pairs, live, start, block_m, block_n) for start in range(0, seq_len, block_m)]
        for pairs, live in zip(related(segment_ids), segment_ids >= 0, strict=True)
    ]
    return torch.tensor(bounds, dtype=torch.int32)


def _bounds(pairs: Tensor, live: Tensor, start: int, block_m: int, block_n: int) -> list[int]:
    seq_len = len(live)
    end = min(start + block_m, seq_len)
    pairs = pairs[start:end][live[start:end]]
    if len(pairs) == 0:
        return [start] * 4
    wanted = pairs.any(0).nonzero().flatten()
    full = pairs.all(0)
    lo = min(start, int(wanted[0]) // block_n * block_n)
    hi = min(max(end, (int(wanted[-1]) // block_n + 1) * block_n), seq_len)
    lo_full, hi_full = start, end
    while lo_full > 0 and full[lo_full - block_n : lo_full].all():
        lo_full -= block_n
    while hi_full + block_n <= seq_len and full[hi_full : hi_full + block_n].all():
        hi_full += block_n
    return [lo, lo_full, hi_full, hi]


def visited_pairs(bounds: Tensor, seq_len: int, block_m: int, block_n: int) -> int:
    """Number of (row, key) pairs in the tiles that a forward pass visits, to check how the work grows."""
    start = torch.arange(bounds.shape[1], device=bounds.device) * block_m
    alive = bounds[..., 3] > start
    below = (start - bounds[..., 0]).clamp(min=0)
    diagonal = (seq_len - start).clamp(max=block_m)
    diagonal = (diagonal + block_n - 1) // block_n * block_n
    return int(((below + diagonal) * alive).sum()) * block_m
