"""Segment helpers, and the tiles that follow from segments."""

from __future__ import annotations

import heapq

import pytest
import relation_kl as rk
import tile_bounds_reference as reference
import torch
from relation_kl import segment_kernels
from relation_kl.segment_kernels import ALIKE, GENERAL, MIXED, PADDED, starts_and_bounds, tile_bounds
from relation_kl.tiles import (
    HOPPER_ROWS,
    divide_last_wave,
    grid,
    pad_head_dim,
    pick_pipeline,
    pick_tiles,
    pick_wide_pipeline,
)
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


TILES = [(8, 8), (16, 4), (64, 32)]


def check_bounds(ids: torch.Tensor, bounds: torch.Tensor, block_m: int, block_n: int) -> None:
    """Every pair to be seen is visited, on both sides, and where no mask is applied none is needed."""
    seq_len = ids.shape[1]
    index = torch.arange(seq_len)
    related = reference.related(ids)
    assert bounds.shape == (len(ids), -(-seq_len // block_m), 5) and bounds.dtype == torch.int32
    for batch in range(len(ids)):
        for tile in range(bounds.shape[1]):
            start, end = tile * block_m, min((tile + 1) * block_m, seq_len)
            lo, lo_full, hi_full, hi, kind = bounds[batch, tile].tolist()
            live = ids[batch, start:end] >= 0
            whole = end - start == block_m and bool(live.all())
            alike = ALIKE if related[batch, start:end, start:end].all() else MIXED
            assert kind == (alike if whole else PADDED).value
            if not live.any():
                assert lo == lo_full == hi_full == hi == start
                continue
            assert lo % block_n == 0 and lo_full % block_n == 0 and (hi_full - end) % block_n == 0
            assert hi == seq_len or (hi - end) % block_n == 0
            assert 0 <= lo <= lo_full <= start and end <= hi_full <= hi <= seq_len
            pairs = related[batch, start:end][live]
            assert not pairs[:, (index < lo) | (index >= hi)].any()
            assert pairs[:, lo_full:start].all()
            assert pairs[:, end:hi_full].all()


@pytest.mark.parametrize(("block_m", "block_n"), TILES)
@pytest.mark.parametrize("kind", ["left", "right", "all_masked", "one_key", "windows", "documents", "scattered"])
@pytest.mark.parametrize("seq_len", [1, 41, 129])
def test_tile_bounds(kind: str, seq_len: int, block_m: int, block_n: int, device: torch.device) -> None:
    torch.manual_seed(0)
    ids = segment_ids_of(kind, 2, seq_len)
    assert ids is not None
    bounds = tile_bounds(ids.contiguous().to(device), block_m, block_n).cpu()
    check_bounds(ids, bounds, block_m, block_n)
    if kind != "scattered":
        assert torch.equal(bounds[..., :4], reference.tile_bounds(ids, block_m, block_n))


def random_ids(kind: str, batch: int, seq_len: int) -> torch.Tensor:
    """Segments of random lengths: numbered in order, either way, or at random; or tokens dealt out one by one."""
    runs = torch.randint(1, max(2, seq_len // 3), (batch, seq_len)).cumsum(1)
    number = (runs[:, :, None] <= torch.arange(seq_len)).sum(1)
    if kind == "falling":
        number = number.amax(1, keepdim=True) - number
    elif kind == "shuffled":
        number = torch.randperm(seq_len)[number]
    elif kind == "recurring":
        number = number % 3
    elif kind == "interleaved":
        number = torch.randint(0, 3, (batch, seq_len))
    # Numbers of any size and distance, in the same order.
    names = torch.randint(0, 2**61, (seq_len,)).sort().values
    ids = names[number]
    for where in torch.randint(0, seq_len, (batch, 2, 2)).sort(-1).values.unbind(1):
        holes = torch.arange(seq_len)
        holes = (holes >= where[:, :1]) & (holes < where[:, 1:]) & (torch.rand(batch, 1) < 0.5)
        ids = ids.masked_fill(holes, int(torch.randint(-(2**40), 0, ())))
    return ids.masked_fill((torch.rand(batch, seq_len) < 0.02) & (torch.rand(batch, 1) < 0.2), -1)


@pytest.mark.parametrize(("block_m", "block_n"), [(16, 16), (32, 8)])
@pytest.mark.parametrize("kind", ["rising", "falling", "shuffled", "recurring", "interleaved"])
def test_tile_bounds_of_random_segments(
    kind: str, block_m: int, block_n: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Always safe; as tight as can be where segments are numbered in order, with padding wherever it may be."""
    # Small enough that a sequence takes several programs and several rounds.
    monkeypatch.setattr(segment_kernels, "_TOKENS", 64)
    monkeypatch.setattr(segment_kernels, "_CHUNK", 16)
    torch.manual_seed(1)
    for seq_len in (3, 96, 301):
        ids = random_ids(kind, 4, seq_len)
        bounds = tile_bounds(ids.to(device), block_m, block_n).cpu()
        check_bounds(ids, bounds, block_m, block_n)
        if kind in ("rising", "falling"):
            assert torch.equal(bounds[..., :4], reference.tile_bounds(ids, block_m, block_n))


def check_starts(ids: torch.Tensor, bounds: torch.Tensor, starts: torch.Tensor, block: int, keys_end: int) -> None:
    """Of all row tiles that are not GENERAL the keys from a row's first one to its last one are those it sees. Rows
    begin at the first multiple of block after keys_end; without a visit keys_end is 0."""
    seq_len = ids.shape[1]
    index = torch.arange(seq_len)
    visible = reference.related(ids) & (index[:, None] >= index)
    ends = index
    if keys_end > 0:
        visible = visible & (index < keys_end)
        ends = index.clamp(max=keys_end - 1)
    said = (index >= starts[:, :, None]) & (index <= ends[:, None])
    general = (bounds[..., 4] >= GENERAL.value).repeat_interleave(block, 1)[:, :seq_len]
    first_row = -(-keys_end // block) * block
    assert torch.equal(said[:, first_row:][~general[:, first_row:]], visible[:, first_row:][~general[:, first_row:]])


def visit_of(ids: torch.Tensor, keys_end: int, block: int) -> tuple[torch.Tensor, int]:
    """Ids of which the first keys_end are keys and the others rows, with padding between; and the first row. Without
    keys they are one sequence."""
    first_row = -(-keys_end // block) * block
    between = ids.new_full((len(ids), first_row - keys_end), -1)
    return torch.cat([ids[:, :keys_end], between, ids[:, keys_end:]], 1), first_row


@pytest.mark.parametrize("block_n", [8, 16])
@pytest.mark.parametrize("kind", ["left", "right", "all_masked", "one_key", "windows", "documents"])
def test_starts(kind: str, block_n: int, device: torch.device) -> None:
    torch.manual_seed(0)
    for seq_len in (1, 41, 129):
        ids = segment_ids_of(kind, 2, seq_len)
        assert ids is not None
        starts, bounds = (x.cpu() for x in starts_and_bounds(ids.contiguous().to(device), 16, block_n))
        assert bool((bounds[..., 4] < GENERAL.value).all())
        check_starts(ids, bounds, starts, 16, 0)


@pytest.mark.parametrize("block_n", [8, 16])
@pytest.mark.parametrize("kind", ["rising", "falling", "shuffled", "recurring", "interleaved"])
def test_starts_of_random_segments(
    kind: str, block_n: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right or GENERAL, in visits, too, and never GENERAL where ids rise or fall without padding."""
    monkeypatch.setattr(segment_kernels, "_TOKENS", 64)
    monkeypatch.setattr(segment_kernels, "_CHUNK", 4)
    torch.manual_seed(2)
    general = torch.zeros(2, dtype=torch.long)
    for seq_len in (3, 96, 130):
        for ids in (random_ids(kind, 2, seq_len), random_ids(kind, 2, seq_len).abs()):
            if bool((ids >= 0).all()) and kind in ("rising", "falling"):
                ids = ids.sort(1, descending=kind == "falling").values
            border = seq_len // 32 * 16  # of a tile
            for keys_end in {0, seq_len // 3, seq_len // 2, border}:
                names, first_row = visit_of(ids, keys_end, 16)
                found = starts_and_bounds(names.to(device), 16, block_n, first_row, keys_end)
                starts, bounds = (x.cpu() for x in found)
                plain = tile_bounds(names.to(device), 16, block_n).cpu()
                assert torch.equal(bounds[..., :4], plain[..., :4])
                assert torch.equal(bounds[..., 4] % GENERAL.value, plain[..., 4])
                check_starts(names, bounds, starts, 16, keys_end)
                of_rows = bounds[:, first_row // 16 :, 4] >= GENERAL.value
                general += torch.tensor([int(of_rows.sum()), of_rows.numel()])
                if bool((ids >= 0).all()) and kind in ("rising", "falling"):
                    assert not of_rows.any()
    assert 0 < general[0] < general[1]


@pytest.mark.parametrize("block_n", [8, 16])
@pytest.mark.parametrize("padding", [-1, -7])
def test_starts_behind_holes(padding: int, block_n: int, device: torch.device) -> None:
    """What comes again behind padding is seen to be there before, wherever tiles begin and whatever else is in them."""
    torch.manual_seed(3)
    for _ in range(12):
        lengths = torch.randint(1, 25, (12,))
        number = torch.randint(0, 3, (12,)).cumsum(0) // 2
        ids = torch.repeat_interleave(torch.where(torch.rand(12) < 0.4, padding, number), lengths)[None]
        for keys_end in (0, ids.shape[1] // 2):
            names, first_row = visit_of(ids, keys_end, 16)
            starts, bounds = (x.cpu() for x in starts_and_bounds(names.to(device), 16, block_n, first_row, keys_end))
            check_starts(names, bounds, starts, 16, keys_end)


def test_work_falls_with_the_square_of_the_segment_length(device: torch.device) -> None:
    seq_len, block_m, block_n = 4096, 128, 64
    whole = torch.zeros(1, seq_len, dtype=torch.long, device=device)

    def pairs(ids: torch.Tensor) -> int:
        return reference.visited_pairs(tile_bounds(ids, block_m, block_n), seq_len, block_m, block_n)

    assert pairs(whole) == seq_len * (seq_len + block_m) // 2
    for window in (1024, 512, 256):
        visited = pairs(rk.cut_into_windows(whole, window))
        assert visited == seq_len // window * (window * (window + block_m) // 2)
    # Windows that do not fit the tiles cost a tile more on either side, no more.
    assert pairs(rk.cut_into_windows(whole, 500)) <= seq_len * (500 + 3 * block_m) / 2
    assert pairs(whole - 1) == 0


def test_tiles_are_a_pure_function() -> None:
    for architecture in ("sm_90", "sm_80", "sm_120", "hip", "interpreter"):
        for head_dim in range(8, 257, 8):
            for element_size in (2, 4):
                tiles = pick_tiles(architecture, head_dim, element_size)
                assert tiles == pick_tiles(architecture, head_dim, element_size)
                for tile in (tiles.forward, tiles.backward):
                    assert tile.block_m % tile.block_n == 0
    assert [pad_head_dim(d) for d in (8, 16, 24, 64, 80, 256)] == [16, 16, 32, 64, 128, 256]


@pytest.mark.parametrize("head_dim", range(1, 257, 5))
def test_hopper_pipelines(head_dim: int) -> None:
    """For 16 bit and 128 channels at most, on Hopper alone; tile_bounds wants whole tiles of keys in one of rows."""
    for architecture in ("sm_80", "sm_89", "sm_100", "sm_120", "hip", "interpreter"):
        assert pick_pipeline(architecture, head_dim, 2) is None
    assert pick_pipeline("sm_90", head_dim, 4) is None
    pipeline = pick_pipeline("sm_90", head_dim, 2)
    assert (pipeline is None) == (head_dim > 128)
    if pipeline is not None:
        assert pipeline == pick_pipeline("sm_90", head_dim, 2)
        assert head_dim <= pipeline.block_k <= pipeline.block_d <= max(64, pad_head_dim(head_dim))
        assert pipeline.parts in (2, 3) and pipeline.slots >= 3
        assert pipeline.tile_slots >= 2 and pipeline.grad_slots >= 1


@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128, 136, 192, 200, 256, 264])
def test_wide_pipelines(head_dim: int) -> None:
    """For 256 channels at most, with tiles that divide a row tile and buffers for more than one of them."""
    wide = pick_wide_pipeline("sm_90", head_dim, 2)
    assert (wide is None) == (head_dim > 256)
    assert pick_wide_pipeline("sm_90", head_dim, 4) is None and pick_wide_pipeline("sm_80", head_dim, 2) is None
    if wide is not None:
        assert head_dim <= wide.block_k <= wide.block_d
        assert HOPPER_ROWS % wide.forward_n == 0 and HOPPER_ROWS % wide.backward_n == 0
        assert wide.block_d % wide.forward_c == 0 and wide.slots > wide.block_d // wide.forward_c


@pytest.mark.parametrize("sequences", [1, 7, 8, 31, 32, 96])
@pytest.mark.parametrize("tiles", [1, 2, 16, 31, 32, 64, 100, 128, 1024])
def test_the_grid_leaves_few_multiprocessors_alone_at_the_end(tiles: int, sequences: int) -> None:
    """Programs, whose last row tile takes longest, go to whichever multiprocessor is free."""
    together, own_tiles, groups = grid(tiles, sequences, 132)
    assert together * groups == sequences and own_tiles == tiles
    order = [
        (tile, group * together + i) for group in range(groups) for tile in range(tiles, 0, -1) for i in range(together)
    ]
    assert len(set(order)) == tiles * sequences
    assert together == 1 or together * tiles <= 8 * 132  # few enough for the cache
    busy = [0] * 132
    for tile, _ in order:
        heapq.heapreplace(busy, busy[0] + tile + 1)
    if tiles * sequences >= 6 * 132 and sequences % 4 == 0:
        assert max(busy) <= 1.05 * sum(busy) / 132
    if (tiles, sequences) == (32, 32):
        assert together == 4
    if (tiles, sequences) in ((128, 32), (1024, 96)):
        assert together == 1


@pytest.mark.parametrize(("sequences", "together"), [(1, 1), (32, 16), (96, 16), (40, 10), (14, 14), (45, 15)])
def test_the_grid_has_some_sequences_together_in_any_case(sequences: int, together: int) -> None:
    for tiles in (64, 128, 1024):
        assert grid(tiles, sequences, 264, 16) == (together, tiles, sequences // together)
    # More where balance asks for them
    assert grid(32, sequences, 264, 16)[0] == max(together, grid(32, sequences, 264)[0])


@pytest.mark.parametrize("key_tiles", [1, 3, 8, 128])
@pytest.mark.parametrize("tiles", [1, 100, 131, 132, 133, 2048, 4096, 8192])
def test_the_last_wave_is_divided_where_that_is_faster(tiles: int, key_tiles: int) -> None:
    whole, parts = divide_last_wave(tiles, key_tiles, 132)
    assert whole % 132 == 0 or parts == 1
    assert 0 <= tiles - whole < 132 and 1 <= parts <= min(8, key_tiles)
    time = whole / 132 + -(-(tiles - whole) * parts // 132) / parts if parts > 1 else -(-tiles // 132)
    assert time <= -(-tiles // 132)
    if tiles == 4096 and key_tiles == 128:
        assert (whole, parts) == (31 * 132, 8) and time == 31.125
