"""Which key tiles a tile of rows must visit, and which keys a row sees, from the segment ids alone: two small launches,
no waiting.

Tiles are compared by the range of their ids. Where segments lie side by side and are numbered in order, rising or
falling, as the helpers in `segments` number them, tiles whose ranges meet share a segment, and no tile is visited for
nothing. Otherwise, more tiles than need be are visited, and masked.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

# The least id of a tile that has none.
_NO_ID = tl.constexpr(2**63 - 1)
# What a row tile is made of; see `tile_bounds`.
MIXED, ALIKE, PADDED, GENERAL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)
# Tokens that a program of the first kernel reads, and tiles that one of the second reads at a time.
_TOKENS = 1024
_CHUNK = 1024


@triton.jit(do_not_specialize=["seq_len"])
def tile_ranges_kernel(segment_ids, ranges, seq_len, BLOCK_N: tl.constexpr, TILES: tl.constexpr):
    """TILES tiles of one sequence; ranges is int64 [B, 4, tiles].

    For each tile: its least id and its largest, not counting negative ones (_NO_ID and a negative number where there
    is no other), then the id that every one of its BLOCK_N tokens has, negative where there is none, and a negative
    number where it has padding or ends beyond the sequence.
    """
    tiles = tl.cdiv(seq_len, BLOCK_N)
    programs = tl.cdiv(tiles, TILES)
    batch = (tl.program_id(0) // programs).to(tl.int64)
    tile = tl.program_id(0) % programs * TILES + tl.arange(0, TILES)
    tokens = tile[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    ids = tl.load(segment_ids + batch * seq_len + tokens, mask=tokens < seq_len, other=-1).to(tl.int64)
    least = tl.min(tl.where(ids >= 0, ids, _NO_ID), 1)
    largest = tl.max(ids, 1)
    any_least = tl.min(ids, 1)
    only = tl.where(any_least == largest, largest, -1)
    place = ranges + batch * 4 * tiles + tile
    tl.store(place, least, mask=tile < tiles)
    tl.store(place + tiles, largest, mask=tile < tiles)
    tl.store(place + 2 * tiles, only, mask=tile < tiles)
    tl.store(place + 3 * tiles, any_least, mask=tile < tiles)


@triton.jit
def _larger(x, y):
    return tl.maximum(x, y)


@triton.jit
def _lesser(x, y):
    return tl.minimum(x, y)


@triton.jit
def _store_starts(
    segment_ids, ranges, starts, seq_len, first_row, keys_end, row_tile,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Each row's first key, of one row tile; returns whether some row's keys may be others than those from there on."""
    tiles = tl.cdiv(seq_len, BLOCK_N)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    ids = tl.load(segment_ids + rows, mask=rows < seq_len, other=-1).to(tl.int64)
    # Of a visit the rows see nothing of one another.
    apart = (first_row > 0) & (row_tile * BLOCK_M >= first_row)
    end = tl.where(apart, keys_end, row_tile * BLOCK_M)
    before = tl.cdiv(end, BLOCK_N)

    # The run that ends where the keys before the row tile do: its id, where it begins, and the least and the largest id
    # before it. In the tile `border` of those keys there is something else, in none for -1.
    run = tl.load(segment_ids + end - 1, mask=end > 0, other=-1).to(tl.int64)
    # Behind the end, which may be within a tile, there is padding, which is not to matter.
    tokens = (before - 1) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = tl.load(segment_ids + tokens, mask=(tokens >= 0) & (tokens < end), other=run).to(tl.int64)
    # Padding is no run: all is before it.
    border = tl.where((run < 0) | (tl.max((there != run).to(tl.int32), 0) > 0), before - 1, -1)
    for chunk in range(0, before - 1, CHUNK):
        tile = chunk + tl.arange(0, CHUNK)
        only = tl.load(ranges + 2 * tiles + tile, mask=tile < before - 1, other=run)
        border = tl.maximum(border, tl.max(tl.where(only != run, tile, -1), 0))
    tokens = border * BLOCK_N + tl.arange(0, BLOCK_N)
    there = tl.load(segment_ids + tokens, mask=(tokens >= 0) & (tokens < end), other=run).to(tl.int64)
    begin = tl.max(tl.where(there != run, tokens + 1, 0), 0)
    outside = (tokens >= 0) & (tokens < begin) & (there >= 0)
    least = tl.min(tl.where(outside, there, _NO_ID), 0)
    largest = tl.max(tl.where(outside, there, -1), 0)
    for chunk in range(0, border, CHUNK):
        tile = chunk + tl.arange(0, CHUNK)
        least = tl.minimum(least, tl.min(tl.load(ranges + tile, mask=tile < border, other=_NO_ID), 0))
        largest = tl.maximum(largest, tl.max(tl.load(ranges + tiles + tile, mask=tile < border, other=-1), 0))
    again = (run >= 0) & (run >= least) & (run <= largest)
    least = tl.where(run >= 0, tl.minimum(least, run), least)
    largest = tl.maximum(largest, run)

    # Runs that begin in the row tile: their ids must be beyond all before them. A visit's rows are each a run.
    last = tl.load(segment_ids + rows - 1, mask=(rows > 0) & (rows < seq_len) & (apart == 0), other=run).to(tl.int64)
    changes = (ids != last) | (rows == 0)
    found = tl.associative_scan(tl.where(changes, rows, -1), 0, _larger)
    last = tl.where(apart | (rows == row_tile * BLOCK_M), -1, last)
    least = tl.minimum(tl.associative_scan(tl.where(last >= 0, last, _NO_ID), 0, _lesser), least)
    largest = tl.maximum(tl.associative_scan(last, 0, _larger), largest)
    old = changes & (ids >= 0) & (ids >= least) & (ids <= largest)
    goes_on = (found < 0) | (apart & (changes == 0))
    found = tl.where(goes_on, begin, tl.where(apart, seq_len, found))
    tl.store(starts + rows, tl.where(ids < 0, rows + 1, found), mask=rows < seq_len)
    return tl.max((old | (goes_on & again & (ids >= 0))).to(tl.int32), 0) > 0


@triton.jit(do_not_specialize=["seq_len", "first_row", "keys_end"])
def tile_bounds_kernel(
    segment_ids, ranges, bounds, starts, seq_len, first_row, keys_end,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, STARTS: tl.constexpr,
):  # fmt: skip
    """One row tile of one sequence, held against every tile of the sequence; see `tile_bounds`, and with STARTS
    `starts_and_bounds`."""
    tiles = tl.cdiv(seq_len, BLOCK_N)
    row_tiles = tl.cdiv(seq_len, BLOCK_M)
    row_tile = tl.program_id(0) % row_tiles
    batch = (tl.program_id(0) // row_tiles).to(tl.int64)
    ranges += batch * 4 * tiles
    # The row tile is the tiles [before, after), of which the last may lie beyond the sequence.
    before = row_tile * (BLOCK_M // BLOCK_N)
    after = before + BLOCK_M // BLOCK_N
    own = before + tl.arange(0, BLOCK_M // BLOCK_N)
    least = tl.min(tl.load(ranges + own, mask=own < tiles, other=_NO_ID), 0)
    largest = tl.max(tl.load(ranges + tiles + own, mask=own < tiles, other=-1), 0)
    alike = tl.min((tl.load(ranges + 2 * tiles + own, mask=own < tiles, other=-1) == least).to(tl.int32), 0) > 0
    padded = tl.min(tl.load(ranges + 3 * tiles + own, mask=own < tiles, other=-1), 0) < 0

    first, last = before, after
    first_full, last_full = before * 0, tiles
    for chunk in range(0, tiles, CHUNK):
        tile = chunk + tl.arange(0, CHUNK)
        low = tl.load(ranges + tile, mask=tile < tiles, other=_NO_ID)
        high = tl.load(ranges + tiles + tile, mask=tile < tiles, other=-1)
        only = tl.load(ranges + 2 * tiles + tile, mask=tile < tiles, other=-1)
        meets = (low <= largest) & (high >= least)
        first = tl.minimum(first, tl.min(tl.where(meets & (tile < before), tile, before), 0))
        last = tl.maximum(last, tl.max(tl.where(meets & (tile >= after), tile + 1, after), 0))
        mixed = only != least
        first_full = tl.maximum(first_full, tl.max(tl.where(mixed & (tile < before), tile + 1, 0), 0))
        last_full = tl.minimum(last_full, tl.min(tl.where(mixed & (tile >= after), tile, tiles), 0))

    start = row_tile * BLOCK_M
    end = tl.minimum(start + BLOCK_M, seq_len)
    some = largest >= 0
    # Rows of padding do not count: what they see is dropped.
    single = least == largest
    bounds += tl.program_id(0).to(tl.int64) * 5
    tl.store(bounds, tl.where(some, first * BLOCK_N, start))
    tl.store(bounds + 1, tl.where(single, first_full * BLOCK_N, start))
    tl.store(bounds + 2, tl.where(single, tl.minimum(last_full * BLOCK_N, seq_len), tl.where(some, end, start)))
    tl.store(bounds + 3, tl.where(some, tl.minimum(last * BLOCK_N, seq_len), start))
    kind = tl.where(padded, PADDED, tl.where(alike, ALIKE, MIXED))
    if STARTS:
        own_ids = segment_ids + batch * seq_len
        own_starts = starts + batch * seq_len
        if _store_starts(own_ids, ranges, own_starts, seq_len, first_row, keys_end, row_tile, BLOCK_M, BLOCK_N, CHUNK):
            kind += GENERAL
    tl.store(bounds + 4, kind)


def tile_bounds(segment_ids: Tensor, block_m: int, block_n: int) -> Tensor:
    """Which tiles a tile of rows must visit: its keys before it, and the rows after it whose key it is.

    Args:
        segment_ids: int32 or int64 [B, T], contiguous; negative = padding.
        block_m: rows a row tile; a multiple of block_n, both powers of two.
        block_n: tokens a visited tile.

    Returns:
        int32 [B, ceil(T / block_m), 5]. Token indices lo, lo_full, hi_full, hi: with s the first row and e the end
        of the row tile, visit [lo, s) and, for the transposed side, [e, hi); within [lo_full, s) and [e, hi_full)
        every token shares a segment with every row but those of padding, and needs no mask. lo and lo_full are
        multiples of block_n; hi_full - e is one, and hi - e one or hi is T. A tile of padding only has
        lo = lo_full = hi_full = hi = s: not even its own diagonal is to be visited. Then what the row tile is made of:
        PADDED where some of its block_m tokens are padding or beyond the sequence; otherwise ALIKE where all are in one
        segment, or MIXED.
    """
    return _launch(segment_ids, block_m, block_n, None, 0, 0)


def starts_and_bounds(
    segment_ids: Tensor, block_m: int, block_n: int, first_row: int = 0, keys_end: int = 0
) -> tuple[Tensor, Tensor]:
    """Each row's first key, and `tile_bounds`.

    A row sees the keys from there on up to itself. Where that cannot be said, as of segments whose tokens are not
    neighbours, or not be seen from the ranges of ids, what the row tile is made of comes with GENERAL added. It can be
    said of runs whose ids are each beyond all ids before them, above or below.

    Args:
        segment_ids: as for `tile_bounds`.
        block_m: as for `tile_bounds`.
        block_n: as for `tile_bounds`.
        first_row: in a visit a multiple of block_m, from which on the rows lie, which see keys only; otherwise 0.
        keys_end: in a visit where the keys end; between them and first_row lies padding.

    Returns:
        starts, int32 [B, T], behind the row where it sees no key; and bounds.
    """
    starts = torch.empty(segment_ids.shape, dtype=torch.int32, device=segment_ids.device)
    return starts, _launch(segment_ids, block_m, block_n, starts, first_row, keys_end)


def _launch(
    segment_ids: Tensor, block_m: int, block_n: int, starts: Tensor | None, first_row: int, keys_end: int
) -> Tensor:
    assert block_m % block_n == 0, (block_m, block_n)
    assert segment_ids.is_contiguous() and segment_ids.dtype in (torch.int32, torch.int64), segment_ids.dtype
    batch, seq_len = segment_ids.shape
    tiles, row_tiles = -(-seq_len // block_n), -(-seq_len // block_m)
    at_once = max(1, _TOKENS // block_n)
    ranges = torch.empty(batch, 4, tiles, dtype=torch.int64, device=segment_ids.device)
    bounds = torch.empty(batch, row_tiles, 5, dtype=torch.int32, device=segment_ids.device)
    of_ranges: dict[str, Any] = {"BLOCK_N": block_n, "TILES": at_once}
    of_bounds: dict[str, Any] = {"BLOCK_M": block_m, "BLOCK_N": block_n, "CHUNK": _CHUNK, "STARTS": starts is not None}
    with torch.cuda.device_of(segment_ids):
        launch(tile_ranges_kernel, -(-tiles // at_once) * batch, segment_ids, ranges, seq_len, **of_ranges)
        tensors = segment_ids, ranges, bounds, bounds if starts is None else starts
        launch(tile_bounds_kernel, row_tiles * batch, *tensors, seq_len, first_row, keys_end, **of_bounds)
    return bounds
