"""Documents into sequences of one length: nothing lost, nothing repeated, segments that do not see each other."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

from linearard.data.corpus import Documents

IGNORE = -100  # label without a target
PADDING_SEGMENT = -1


class PackedDataset:
    """Sequences of `seq_len` tokens from documents.

    packing "documents": a document longer than `seq_len` is cut into pieces of `seq_len`; its tail and the shorter
    documents are packed together, best fit first; each piece is a segment of its own. packing "stream": documents are
    joined and the whole is cut into sequences of one segment each. Either way each token is in exactly one sequence,
    and what is left at the end of a sequence is padding.

    The index is a few arrays of integers, 12 bytes a piece and 8 a sequence.

    Args:
        documents: The tokenised documents.
        seq_len: Tokens of a sequence.
        packing: "documents" or "stream".
        seed: Order of the documents before they are packed or joined; None keeps it as it is.
    """

    def __init__(self, documents: Documents, seq_len: int, packing: str = "documents", seed: int | None = None) -> None:
        if packing not in ("documents", "stream"):
            raise ValueError(f"packing: {packing!r} is not documents or stream")
        if seq_len < 1:
            raise ValueError(f"seq_len: {seq_len} is not positive")
        self.documents, self.seq_len, self.packing, self.seed = documents, seq_len, packing, seed
        order = np.arange(len(documents)) if seed is None else np.random.default_rng(seed).permutation(len(documents))
        starts, lengths = documents.starts[order], documents.lengths[order]
        if packing == "stream":
            # The stream is cut at every multiple of seq_len, wherever documents begin.
            ends = np.cumsum(lengths)
            phase = (ends - lengths) % seq_len
        else:
            phase = np.zeros(len(lengths), np.int64)
        starts, lengths = _cut(starts, lengths, phase, seq_len)
        if packing == "stream":
            sequence = (np.cumsum(lengths) - 1) // seq_len
        else:
            sequence = _best_fit_decreasing(lengths, seq_len)
            by_sequence = np.argsort(sequence, kind="stable")
            starts, lengths, sequence = starts[by_sequence], lengths[by_sequence], sequence[by_sequence]
        self._starts = starts
        self._lengths = lengths.astype(np.int32)
        self._first = np.searchsorted(sequence, np.arange(sequence[-1] + 2 if len(sequence) else 1))

    def __len__(self) -> int:
        return len(self._first) - 1

    @property
    def padding_fraction(self) -> float:
        """Share of positions that hold no token."""
        return 1 - self.documents.total_tokens / (len(self) * self.seq_len) if len(self) else 0.0

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """One sequence.

        Returns:
            int64 arrays [seq_len]: `input_ids` (0 on padding); `labels`, the token to predict FROM a position, -100 at
            the last token of a segment and on padding; `segment_ids`, 0, 1, ... and -1 on padding; `position_ids`,
            from 0 in each segment (0 on padding).
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        pieces = slice(self._first[index], self._first[index + 1])
        input_ids = np.zeros(self.seq_len, np.int64)
        labels = np.full(self.seq_len, IGNORE, np.int64)
        segment_ids = np.full(self.seq_len, PADDING_SEGMENT, np.int64)
        position_ids = np.zeros(self.seq_len, np.int64)
        at = 0
        for segment, (start, length) in enumerate(zip(self._starts[pieces], self._lengths[pieces], strict=True)):
            input_ids[at : at + length] = self.documents.tokens_array[start : start + length]
            if self.packing == "documents":
                labels[at : at + length - 1] = input_ids[at + 1 : at + length]
                segment_ids[at : at + length] = segment
                position_ids[at : at + length] = np.arange(length)
            at += int(length)
        if self.packing == "stream":
            labels[: at - 1] = input_ids[1:at]
            segment_ids[:at] = 0
            position_ids[:at] = np.arange(at)
        return {"input_ids": input_ids, "labels": labels, "segment_ids": segment_ids, "position_ids": position_ids}


def _cut(starts: np.ndarray, lengths: np.ndarray, phase: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Pieces (starts, lengths), int64, of documents cut where `phase` + offset is a multiple of seq_len."""
    count = -(-(phase + lengths) // seq_len)
    count[lengths == 0] = 0
    document = np.repeat(np.arange(len(starts)), count)
    number = np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)
    begin = np.maximum(number * seq_len - phase[document], 0)
    end = np.minimum((number + 1) * seq_len - phase[document], lengths[document])
    return starts[document] + begin, end - begin


def _best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The bin of each length, int64: longest first, each into the fullest bin with room for it.

    Lengths are small integers, so equal lengths and equally full bins are handled as blocks: a bin that is the best
    fit for one piece is also the best for the next of that length, until it is full. That makes 10^7 pieces cheap.
    Bins are numbered by their first piece.
    """
    order = np.argsort(-lengths, kind="stable")
    sizes, counts = np.unique(lengths, return_counts=True)
    bin_of = np.empty(len(lengths), np.int64)
    room: dict[int, list[np.ndarray]] = {}  # free tokens -> blocks of bins with that much room
    free: list[int] = []  # the keys of room, sorted
    done = bins = 0

    def put(left: int, block: np.ndarray) -> None:
        if left and len(block):
            if left not in room:
                room[left] = []
                insort(free, left)
            room[left].append(block)

    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            best = bisect_left(free, size)
            if best == len(free):
                left = capacity
                block = np.arange(bins, bins - (-count // (capacity // size)))
                bins += len(block)
            else:
                left = free[best]
                block = room[left].pop()
                if not room[left]:
                    del room[left], free[best]
            each = left // size  # pieces that one of these bins takes
            used, unused = np.split(block, [-(-count // each)])
            placed = min(count, len(used) * each)
            bin_of[order[done : done + placed]] = np.repeat(used, each)[:placed]
            put(left, unused)
            put(left - each * size, used[:-1])
            put(left - (placed - (len(used) - 1) * each) * size, used[-1:])
            done += placed
            count -= placed
    first = np.full(bins, len(lengths))
    np.minimum.at(first, bin_of, np.arange(len(lengths)))
    rank = np.empty(bins, np.int64)
    rank[np.argsort(first)] = np.arange(bins)
    return rank[bin_of]


def evaluation_windows(
    documents: Documents, length: int, max_windows: int, *, allow_short: bool = False
) -> list[np.ndarray]:
    """Windows for held-out evaluation, each from a single document.

    A document is cut into windows of `length` from its start, so that BOS opens its first window. First windows of
    all documents come first, then second windows, and so on: a few long documents do not crowd out the others.

    Args:
        documents: Usually `Corpus.held_out`.
        length: Tokens of a window.
        max_windows: Most windows to return.
        allow_short: Also take documents and remainders shorter than `length`, of at least 2 tokens.

    Returns:
        int64 arrays of `length` tokens (at most `length` with `allow_short`); fewer than `max_windows`, or none, where
        the documents give no more.
    """
    windows: list[np.ndarray] = []
    shortest = 2 if allow_short else length
    begin = 0
    while len(windows) < max_windows:
        eligible = np.flatnonzero(documents.lengths >= begin + shortest)
        if not len(eligible):
            break
        for index in eligible[: max_windows - len(windows)]:
            windows.append(documents.tokens(int(index))[begin : begin + length].astype(np.int64))
        begin += length
    return windows
