"""Tile sizes of the Triton kernels: frozen data, picked by a pure function."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Tile:
    """A kernel's launch shape: block_m rows against block_n keys at a time, which divides block_m."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Tiles:
    """The launch shapes of the forward and of the backward kernel."""

    forward: Tile
    backward: Tile


# Rows a row tile of the Hopper kernels.
HOPPER_ROWS = 128
# Rows of a warpgroup of them and, up to 128 channels, keys of a tile.
HOPPER_BLOCK = 64
# Sequences of which the Hopper kernels take row tiles together: faster than balance alone explains (TRIED.md).
FORWARD_TOGETHER, BACKWARD_TOGETHER = 16, 4


@dataclass(frozen=True)
class Pipeline:
    """The shapes of the Hopper kernels up to 128 channels: rows against HOPPER_BLOCK keys at a time.

    Vectors are padded to block_d channels in shared memory; logits and gradients are of the first block_k of them: all,
    or half of them and a power of two. In forward a program has HOPPER_ROWS rows, and `slots` buffers of keys, the
    student's and the teacher's counted singly. In backward it has HOPPER_BLOCK rows for each of `parts` warpgroups,
    tile_slots buffers of the keys of a tile, student's and teacher's, and of its weights, and grad_slots of the keys'
    gradient.
    """

    slots: int
    parts: int
    tile_slots: int
    grad_slots: int
    block_d: int
    block_k: int


@dataclass(frozen=True)
class WidePipeline:
    """The shapes of the Hopper kernels for more than 128 channels, and of the backward one in deterministic mode.

    HOPPER_ROWS rows against forward_n keys at a time, or against backward_n tokens. In forward, tiles of keys come in
    parts of forward_c channels, into `slots` buffers. Vectors are padded to block_d channels; logits are of the first
    block_k of them.
    """

    forward_n: int
    forward_c: int
    slots: int
    backward_n: int
    block_d: int
    block_k: int


# Channels up to which it serves -> pipeline. Backward takes up to 225 KiB of shared memory, of 227 that a program can
# have, and forward 112, of 113 that two programs on a multiprocessor can have each.
_PIPELINES = {
    64: Pipeline(8, 3, 3, 2, 64, 64),
    80: Pipeline(3, 2, 2, 1, 128, 80),
    96: Pipeline(3, 2, 2, 1, 128, 96),
    128: Pipeline(3, 2, 2, 1, 128, 128),
}
# The same of the others. Above 128 channels they take 224 to 226 KiB; up to there only backward's are used.
_WIDE_PIPELINES = {
    64: WidePipeline(128, 64, 3, 64, 64, 64),
    96: WidePipeline(128, 128, 3, 64, 128, 96),
    128: WidePipeline(128, 128, 3, 64, 128, 128),
    192: WidePipeline(128, 128, 3, 64, 256, 192),
    256: WidePipeline(128, 128, 3, 64, 256, 256),
}

# (architecture as CUDA spells it, bytes of a token's padded vector) -> tiles
_TILES = {
    # 8 to 64 channels in 16 bit
    ("sm_90", 128): Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3)),
    # 128 channels in 16 bit
    ("sm_90", 256): Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2)),
    # 256 channels in 16 bit
    ("sm_90", 512): Tiles(Tile(64, 64, 8, 2), Tile(128, 32, 8, 2)),
}

# For a GPU without an entry, compute capability 8.0 or newer: those have 99 KiB of shared memory a block or more, and
# the compiler asks for 64 KiB at most (tests/kernels/test_relation_kl_compile.py).
_SAFE = {
    256: Tiles(Tile(64, 32, 4, 1), Tile(64, 32, 4, 1)),
    512: Tiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    1024: Tiles(Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
}

# The interpreter's time goes by the operation, not by the element: large tiles are faster there.
_INTERPRETER = Tiles(Tile(128, 64, 4, 1), Tile(128, 64, 4, 1))


def pad_head_dim(head_dim: int) -> int:
    """The power of two to which the kernels pad the channels; 16 is the least a matrix product takes."""
    return max(16, 1 << (head_dim - 1).bit_length())


@lru_cache
def pick_tiles(architecture: str, head_dim: int, element_size: int) -> Tiles:
    """Tile sizes for a GPU and a kind of input.

    Args:
        architecture: "sm_90" and the like; "interpreter" under TRITON_INTERPRET=1. Unknown ones get a safe
            default.
        head_dim: D, before padding.
        element_size: bytes of one element, 2 or 4.
    """
    if architecture == "interpreter":
        return _INTERPRETER
    token_bytes = pad_head_dim(head_dim) * element_size
    # fp32 products run without tensor cores and keep more in registers: they take the safe tiles.
    if element_size == 2:
        known = _TILES.get((architecture, max(token_bytes, 128)))
        if known is not None:
            return known
    return _SAFE[max(token_bytes, 256)]


@lru_cache
def pick_pipeline(architecture: str, head_dim: int, element_size: int) -> Pipeline | None:
    """The Hopper kernels' shapes, or None where they do not run: other GPUs, fp32, more than 128 channels.

    Args:
        architecture: as for `pick_tiles`.
        head_dim: D, before padding.
        element_size: bytes of one element, 2 or 4.
    """
    if architecture != "sm_90" or element_size != 2:
        return None
    return next((pipeline for most, pipeline in _PIPELINES.items() if head_dim <= most), None)


@lru_cache
def pick_wide_pipeline(architecture: str, head_dim: int, element_size: int) -> WidePipeline | None:
    """The shapes of those Hopper kernels, or None where they do not run: other GPUs, fp32, more than 256 channels.

    Args:
        architecture: as for `pick_tiles`.
        head_dim: D, before padding.
        element_size: bytes of one element, 2 or 4.
    """
    if architecture != "sm_90" or element_size != 2:
        return None
    return next((pipeline for most, pipeline in _WIDE_PIPELINES.items() if head_dim <= most), None)


@lru_cache(maxsize=1024)
def grid(tiles: int, sequences: int, programs: int, least: int = 1) -> tuple[int, int, int]:
    """The order of row tiles, of which the last ones of a sequence take longest: a grid, or backward's counter.

    The first number runs fastest, and row tiles descend: the longest ones of some sequences together go first, so that
    few programs wait for a long one at the end. No more sequences together than that takes, for their keys are to stay
    in the cache, but `least` of them in any case, or as many up to that as divide all.

    Args:
        tiles: row tiles of a sequence.
        sequences: batch times heads.
        programs: that run at a time on the GPU.
        least: FORWARD_TOGETHER, BACKWARD_TOGETHER.

    Returns:
        (sequences together, row tiles, groups of sequences).
    """
    together = 1
    if tiles * sequences <= 32 * programs:  # with more, the end matters little
        most = max(1, 8 * programs // tiles)
        divisors = [count for count in range(1, sequences + 1) if sequences % count == 0 and count <= most]
        times = {count: _makespan(tiles, sequences, count, programs) for count in divisors}
        # 1 % faster is not worth another sequence.
        together = min(divisors, key=lambda count: (round(times[count], 2), count))
    together = max(together, *(count for count in range(1, least + 1) if sequences % count == 0))
    return together, tiles, sequences // together


def _makespan(tiles: int, sequences: int, together: int, programs: int) -> float:
    """How long the row tiles take, over what they would with all programs busy until the end."""
    busy = [0] * programs
    for _ in range(sequences // together):
        for tile in range(tiles, 0, -1):
            for _ in range(together):
                # One tile of keys more is what a row tile takes to begin and to end.
                heapq.heapreplace(busy, busy[0] + tile + 1)
    return max(busy) / (sum(busy) / programs)


def divide_last_wave(tiles: int, key_tiles: int, multiprocessors: int) -> tuple[int, int]:
    """How row tiles that all take equally long are cut into pieces of work, of which each fills a multiprocessor.

    Where there are a few more than fill all multiprocessors some times over, the last ones would run almost alone:
    those are divided by their keys, into 8 pieces at most.

    Args:
        tiles: row tiles.
        key_tiles: tiles of keys that each visits.
        multiprocessors: of the GPU.

    Returns:
        (row tiles of one piece, pieces of each of the others).
    """
    rest = tiles % multiprocessors
    possible = [parts for parts in (1, 2, 4, 8) if parts <= key_tiles]
    # The time of the last ones, in units of a whole program.
    parts = min(possible, key=lambda parts: (-(-rest * parts // multiprocessors) / parts, parts))
    return (tiles, 1) if parts == 1 else (tiles - rest, parts)
