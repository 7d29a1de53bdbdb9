"""The endless stream of batches: seeded, split over data-parallel ranks, and able to go on where it stopped."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from linearard.data.packing import PackedDataset
from linearard.errors import UserError


class BatchStream:
    """Batches of one data-parallel rank.

    The stream is the concatenation of the epochs' permutations: global sample g is sequence g % n of epoch g // n,
    whose order comes from (seed, epoch) alone. Each batch takes the next micro_batch_size * data_parallel_size
    samples, rank r the r-th block of them; a batch may reach into the next epoch, so no sequence is ever dropped.
    The position is one number, global samples consumed, and holds for any number of ranks.

    Args:
        dataset: The packed sequences, the same on all ranks.
        micro_batch_size: Sequences per rank and batch.
        data_parallel_rank: Ranks that share one sequence (sequence parallelism) pass the same number.
        data_parallel_size: Number of data-parallel ranks.
        seed: Seed of the order.
        shuffle: False: the order of the data set, every epoch.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        micro_batch_size: int,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        if not len(dataset):
            raise UserError("data.sources: no sequence to train on; add text")
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise ValueError(f"data_parallel_rank: {data_parallel_rank} is not below {data_parallel_size}")
        if micro_batch_size < 1:
            raise ValueError(f"micro_batch_size: {micro_batch_size} is not positive")
        self.dataset = dataset
        self.micro_batch_size = micro_batch_size
        self.data_parallel_rank = data_parallel_rank
        self.data_parallel_size = data_parallel_size
        self.seed, self.shuffle = seed, shuffle
        self.samples = 0  # global samples consumed
        self._orders: dict[int, np.ndarray] = {}  # epoch -> permutation; one or two at a time

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self.samples / len(self.dataset)

    def next_batch(self) -> dict[str, torch.Tensor]:
        """This rank's next sequences.

        Returns:
            int64 tensors [micro_batch_size, seq_len] on the CPU, named as in `PackedDataset.__getitem__`.
        """
        first = self.samples + self.data_parallel_rank * self.micro_batch_size
        rows = [self.dataset[self._sequence(first + i)] for i in range(self.micro_batch_size)]
        self.samples += self.micro_batch_size * self.data_parallel_size
        return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}

    def _sequence(self, sample: int) -> int:
        epoch, position = divmod(sample, len(self.dataset))
        if not self.shuffle:
            return position
        if epoch not in self._orders:
            self._orders = {known: order for known, order in self._orders.items() if known == epoch - 1}
            self._orders[epoch] = np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))
        return int(self._orders[epoch][position])

    def _settings(self) -> dict[str, Any]:
        return {
            "documents": self.dataset.documents.name,
            "sequences": len(self.dataset),
            "seq_len": self.dataset.seq_len,
            "packing": self.dataset.packing,
            "packing_seed": self.dataset.seed,
            "seed": self.seed,
            "shuffle": self.shuffle,
        }

    def state_dict(self) -> dict[str, Any]:
        """Position and what it refers to; plain values, the same on every rank between batches."""
        return {"samples": self.samples, "settings": self._settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on at a saved position, on any number of ranks and with any micro-batch size.

        Raises:
            UserError: The state belongs to other data or other settings.
        """
        saved, current = state["settings"], self._settings()
        changed = [
            f"{name} (was {saved.get(name)}, is {value})" for name, value in current.items() if saved.get(name) != value
        ]
        if changed:
            raise UserError(
                f"data: the checkpoint's position belongs to another stream: {', '.join(changed)}; "
                "restore the data and its settings, or start a new run directory"
            )
        self.samples = int(state["samples"])
