"""Segment helpers, and the tiles that follow from segments."""

from __future__ import annotations

import pytest
import relation_kl as rk
import torch
from relation_kl.segments import locate_segments, tile_bounds, visited_pairs
from relation_kl.tiles import pad_head_dim, pick_tiles
from relation_kl_checks import segment_ids_of


def test_from_attention_mask() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    assert rk.segments_from_attention_mask(mask).tolist() == [[-1, -1, 0, 0], [0, 0, 0, -1]]
    assert rk.segments_from_attention_mask(mask.bool()).dtype == torch.int32


def test_from_position_ids() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [4, 5, 0, 1, 2, 3]])
    assert rk.segments_from_position_ids(positions).tolist() == [[0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 1, 1]]
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]])
    ids = rk.segments_from_position_ids(positions, mask)
    assert ids.tolist() == [[0, 0, 0, 1, 1, -1], [-1, -1, 1, 1, 1, 1]]


def test_from_cu_seqlens() -> None:
    cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)
    assert rk.segments_from_cu_seqlens(cu_seqlens).tolist() == [[0, 0, 1, 1, 1]]
    assert rk.segments_from_cu_seqlens(cu_seqlens, 7).tolist() == [[0, 0, 1, 1, 1, -1, -1]]
    with pytest.raises(ValueError, match="seq_len is 4, but cu_seqlens ends at 5"):
        rk.segments_from_cu_seqlens(cu_seqlens, 4)
    with pytest.raises(ValueError, match="cu_seqlens is empty"):
        rk.segments_from_cu_seqlens(cu_seqlens[:0])
    with pytest.raises(ValueError, match="cu_seqlens has shape"):
        rk.segments_from_cu_seqlens(cu_seqlens[None])


def test_cut_into_windows() -> None:
    ids = torch.tensor([[0, 0, 0, 0, 0, 9, 9, -1]])
    cut = rk.cut_into_windows(ids, 3)[0]
    assert [int(cut[i] == cut[i + 1]) for i in range(7)] == [1, 1, 0, 1, 0, 0, 0]
    assert cut[7] < 0
    # The shards of a sequence carry the numbers that the whole carries.
    shards = [rk.cut_into_windows(ids[:, :4], 3), rk.cut_into_windows(ids[:, 4:], 3, offset=4)]
    assert torch.equal(torch.cat(shards, 1)[0], cut)
    with pytest.raises(ValueError, match="window is 0"):
        rk.cut_into_windows(ids, 0)
    with pytest.raises(ValueError, match="offset is -1"):
        rk.cut_into_windows(ids, 3, offset=-1)


@pytest.mark.parametrize("block_m,block_n", [(8, 8), (16, 4), (64, 32)])
@pytest.mark.parametrize("kind", ["left", "right", "all_masked", "one_key", "windows", "documents", "scattered"])
@pytest.mark.parametrize("seq_len", [1, 41, 129])
def test_tile_bounds(kind: str, seq_len: int, block_m: int, block_n: int) -> None:
    """Every pair to be seen is visited, on both sides, and where no mask is applied none is needed."""
    torch.manual_seed(0)
    ids = segment_ids_of(kind, 2, seq_len)
    assert ids is not None
    bounds = tile_bounds(locate_segments(ids), block_m, block_n)
    index = torch.arange(seq_len)
    valid = ids >= 0
    related = (ids[:, :, None] == ids[:, None, :]) & valid[:, :, None]
    for batch in range(2):
        for tile in range(bounds.shape[1]):
            start, end = tile * block_m, min((tile + 1) * block_m, seq_len)
            lo, lo_full, hi_full, hi = bounds[batch, tile].tolist()
            pairs = related[batch, start:end]
            if not valid[batch, start:end].any():
                assert lo == lo_full == hi_full == hi == start
                continue
            assert lo % block_n == 0 and lo_full % block_n == 0 and (hi_full - end) % block_n == 0
            assert 0 <= lo <= lo_full <= start and end <= hi_full <= hi <= seq_len
            assert not pairs[:, (index < lo) | (index >= hi)].any()
            rows = valid[batch, start:end]
            assert pairs[rows][:, lo_full:start].all()
            assert pairs[rows][:, end:hi_full].all()


def test_work_falls_with_the_square_of_the_segment_length() -> None:
    seq_len, block_m, block_n = 4096, 64, 32
    whole = torch.zeros(1, seq_len, dtype=torch.long)

    def pairs(ids: torch.Tensor) -> int:
        return visited_pairs(tile_bounds(locate_segments(ids), block_m, block_n), seq_len, block_m, block_n)

    assert pairs(whole) == seq_len * (seq_len + block_m) // 2
    for window in (1024, 512, 256):
        visited = pairs(rk.cut_into_windows(whole, window))
        assert visited == seq_len // window * (window * (window + block_m) // 2)
    # Windows that do not fit the tiles cost a tile more on either side, no more.
    assert pairs(rk.cut_into_windows(whole, 500)) <= seq_len * (500 + 3 * block_m) / 2
    assert pairs(whole - 1) == 0


def test_segment_ids_of_any_size() -> None:
    """Ids are names: large ones, and ones that differ beyond 32 bits, are told apart."""
    ids = torch.tensor([[5, 5 + 2**32, 5, 2**62, -(2**40)]])
    assert locate_segments(ids).first.tolist() == [[0, 1, 0, 3, -1]]
    assert locate_segments(ids).last.tolist() == [[2, 1, 2, 3, -1]]
    assert locate_segments(ids.to(torch.int8)).first.dtype == torch.int32


def test_tiles_are_a_pure_function() -> None:
    for architecture in ("sm_90", "sm_80", "sm_120", "hip", "interpreter"):
        for head_dim in range(8, 257, 8):
            for element_size in (2, 4):
                tiles = pick_tiles(architecture, head_dim, element_size)
                assert tiles == pick_tiles(architecture, head_dim, element_size)
                for tile in (tiles.forward, tiles.backward):
                    assert tile.block_m % tile.block_n == 0
    assert [pad_head_dim(d) for d in (8, 16, 24, 64, 80, 256)] == [16, 16, 32, 64, 128, 256]
