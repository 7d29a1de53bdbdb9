"""How a batch is cut: into shards over ranks, documents, and the teacher's native-length windows.

All of it is integer arithmetic on the host, done once per micro-batch, so that no layer has to ask the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from linearard.parallel import ParallelContext


@dataclass(frozen=True)
class Segments:
    """Contiguous runs of [B, T] tokens inside which attention is confined.

    Attributes:
        batch_size: B.
        length: T.
        cu_seqlens: run borders over the flattened B * T tokens, from 0 to B * T; no run crosses a row.
        device_cu_seqlens: the same, int32, on the attention's device.
    """

    batch_size: int
    length: int
    cu_seqlens: tuple[int, ...]
    device_cu_seqlens: torch.Tensor

    @property
    def uniform_length(self) -> int | None:
        """The runs' length where all have the same one, else None."""
        run = self.cu_seqlens[1]
        equal = all(b - a == run for a, b in zip(self.cu_seqlens, self.cu_seqlens[1:], strict=False))
        return run if equal else None

    @property
    def max_length(self) -> int:
        return max(b - a for a, b in zip(self.cu_seqlens, self.cu_seqlens[1:], strict=False))


def segments_of(ids: torch.Tensor, device: torch.device) -> Segments:
    """Segments of host integer ids [B, T]: a run is a maximal stretch of equal ids (padding is a run, too)."""
    batch_size, length = ids.shape
    borders = [*_starts(ids).flatten().nonzero().flatten().tolist(), batch_size * length]
    on_device = torch.tensor(borders, dtype=torch.int32).to(device, non_blocking=True)
    return Segments(batch_size, length, tuple(borders), on_device)


def relation_segment_ids(segment_ids: torch.Tensor, window: int) -> torch.Tensor:
    """Ids of the pieces that a document and a window of `window` tokens share.

    Args:
        segment_ids: documents, [B, T] integers on the host, negative for padding.
        window: windows start at multiples of this many tokens of the sequence.

    Returns:
        int32 [B, T], numbered from 0 in each row; -1 for padding.
    """
    index = torch.arange(segment_ids.shape[1])
    start = _starts(segment_ids) | (index % window == 0)
    ids = start.int().cumsum(1) - 1
    return torch.where(segment_ids < 0, -1, ids).int()


def positions_of(ids: torch.Tensor) -> torch.Tensor:
    """Position of each token in its run of equal ids: int64 [B, T], from 0."""
    index = torch.arange(ids.shape[1]).expand_as(ids)
    return index - torch.where(_starts(ids), index, 0).cummax(1).values


def _starts(ids: torch.Tensor) -> torch.Tensor:
    start = torch.ones_like(ids, dtype=torch.bool)
    start[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return start


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch as this rank sees it. T is the whole sequence, N = T / P this rank's shard.

    Attributes:
        input_ids, position_ids: student's shard, int64 [B, N] on the device.
        labels: next token of each position, -100 where there is none, int64 [B, N].
        segments: documents, over the whole sequence [B, T] (what attention sees inside Ulysses).
        teacher_input_ids, teacher_position_ids: [B * N / W, W] where shards hold whole windows, else [B, N].
        teacher_segments: of [B * N / W, W], or of [B, T] where the teacher runs inside Ulysses, too.
        local_windows: shards hold whole windows of W tokens; teacher and relations need no communication.
        observe_shards: relations see shards of all heads, before Ulysses' all-to-all: with local windows, and where
            they are computed over a group (mode sequence).
        relation_segment_ids: int32 on the device, [B, N] if observe_shards, else [B, T].
        relation_rows: valid rows of the relations in this rank's shard, for one head.
        label_count: next-token labels in this rank's shard.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    segments: Segments
    teacher_input_ids: torch.Tensor
    teacher_position_ids: torch.Tensor
    teacher_segments: Segments
    local_windows: bool
    observe_shards: bool
    relation_segment_ids: torch.Tensor
    relation_rows: int
    label_count: int


def cut(
    batch: dict[str, torch.Tensor], window: int, local_windows: bool, observe_shards: bool, context: ParallelContext
) -> MicroBatch:
    """Cuts a batch that is equal on all ranks of a sequence-parallel group.

    Args:
        batch: host tensors [B, T]: input_ids, labels, position_ids, segment_ids (negative: padding).
        window: tokens of one teacher window.
        local_windows: run teacher and relations on whole windows inside each shard (`relation_mode`).
        observe_shards: compute relations on shards of all heads; implied by local_windows.
        context: this rank's place.
    """
    device = context.device
    observe_shards = observe_shards or local_windows

    def move(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous().to(device, non_blocking=True)

    documents = batch["segment_ids"]
    pieces = relation_segment_ids(documents, window)
    teacher_positions = positions_of(pieces)
    shard_ids, shard_pieces = context.shard(batch["input_ids"]), context.shard(pieces)
    shard_labels = context.shard(batch["labels"])
    if local_windows:
        teacher_ids = shard_ids.reshape(-1, window)
        teacher_segments = segments_of(shard_pieces.reshape(-1, window), device)
        teacher_positions = context.shard(teacher_positions).reshape(-1, window)
    else:
        teacher_ids = shard_ids
        teacher_segments = segments_of(pieces, device)
        teacher_positions = context.shard(teacher_positions)
    return MicroBatch(
        input_ids=move(shard_ids),
        position_ids=move(context.shard(batch["position_ids"])),
        labels=move(shard_labels),
        segments=segments_of(documents, device),
        teacher_input_ids=move(teacher_ids),
        teacher_position_ids=move(teacher_positions),
        teacher_segments=teacher_segments,
        local_windows=local_windows,
        observe_shards=observe_shards,
        relation_segment_ids=move(shard_pieces if observe_shards else pieces),
        relation_rows=int((shard_pieces >= 0).sum()),
        label_count=int((shard_labels >= 0).sum()),
    )


def whole_sequence(input_ids: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, Segments]:
    """input_ids, position_ids and segments of [B, T] host tokens that are one segment a row, not sharded."""
    ids = torch.zeros_like(input_ids)
    return input_ids.to(device), positions_of(ids).to(device), segments_of(ids, device)
