"""The harmful stream: which rows each training step sees, as a pure function of (seed, step)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from hf_immunize.errors import DataError


class StepSampler(Sampler[list[int]], ABC):
    """Batches of row indices from micro-step ``start`` on, a step's batch being a pure function of (seed, step).

    A step's batch is drawn as a whole and cut into ``parts`` micro-batches, so that what a step sees does not depend on
    how it is cut, nor on how many ranks share it.

    Raises:
        DataError: rows that cannot be cut into so many parts.
    """

    def __init__(self, rows_per_batch: int, seed: int, start: int, rank: int, world_size: int, parts: int = 1):
        if rows_per_batch % parts:
            raise DataError(f"expected a batch of a step that can be cut into {parts}, got {rows_per_batch} rows.")
        self._batch, self._seed, self.start, self._parts = rows_per_batch, seed, start, parts
        self._rank, self._world = rank, world_size

    @abstractmethod
    def global_batch(self, step: int) -> torch.Tensor:
        """Row indices of the whole batch of one step, over all ranks."""

    def _generator(self, step: int) -> torch.Generator:
        return torch.Generator().manual_seed((self._seed * 1_000_003 + step) % 2**63)

    def __iter__(self) -> Iterator[list[int]]:
        step, part = divmod(self.start, self._parts)
        while True:
            batches = self.global_batch(step).chunk(self._parts)
            for batch in batches[part:]:
                yield batch[self._rank :: self._world].tolist()
            step, part = step + 1, 0


class RowBatchSampler(StepSampler):
    """Batches of rows without classes: drawn without replacement; a batch that holds more than there are repeats some.

    Args:
        rows: how many there are.
        rows_per_batch: rows of the *global* batch.
        seed, start, rank, world_size, parts: as in StepBatchSampler.

    Raises:
        DataError: fewer than two rows, in all or in a batch.
    """

    def __init__(
        self, rows: int, rows_per_batch: int, *, seed: int, start: int = 0, rank: int = 0, world_size: int = 1,
        parts: int = 1,
    ):
        if rows < 2:
            raise DataError(
                f"expected at least two rows in harmful_dataset, got {rows}: the features of one image have no "
                "spectrum. Bring more images."
            )
        if rows_per_batch < 2:
            raise DataError(
                f"expected a global harmful batch of at least two rows, got {rows_per_batch}: raise "
                "per_device_harmful_batch_size."
            )
        super().__init__(rows_per_batch, seed, start, rank, world_size, parts)
        self._rows = rows

    def global_batch(self, step: int) -> torch.Tensor:
        """Row indices of the whole batch of one step, over all ranks."""
        generator = self._generator(step)
        rows = torch.randperm(self._rows, generator=generator)[: self._batch]
        again = torch.randint(self._rows, (self._batch - len(rows),), generator=generator)
        return torch.cat([rows, again])


class StepBatchSampler(StepSampler):
    """Batches of row indices for consecutive steps, each drawn by a generator seeded with (seed, step).

    Because step s never depends on what was drawn before it, a resumed run continues bit for bit, and the global
    batch of step s is the same on any number of processes: rank r takes rows r, r+W, r+2W, …

    Classes are drawn evenly: ``classes_per_batch`` classes (all by default), each with an equal share of rows drawn
    without replacement (with replacement only when a class has fewer rows than its share).

    Args:
        labels: one integer label per row.
        rows_per_batch: rows of the *global* batch of a step.
        seed, start: the stream and the first micro-step to draw.
        classes_per_batch: how many classes an episode holds.
        rank, world_size: this process's share.
        parts: micro-batches of a step.

    Raises:
        DataError: no rows, fewer than two classes, or a batch too small for two rows of two classes.
    """

    def __init__(
        self,
        labels: Sequence[int],
        rows_per_batch: int,
        *,
        seed: int,
        start: int = 0,
        classes_per_batch: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        parts: int = 1,
    ):
        if len(labels) == 0:
            raise DataError("expected at least one harmful row, got an empty harmful_dataset: check its split.")
        all_labels = torch.as_tensor(labels)
        self._rows = [(all_labels == label).nonzero().flatten() for label in all_labels.unique()]
        if len(self._rows) < 2:
            raise DataError("expected at least two harmful classes, got one: the attacker's task needs a choice.")
        self._classes = min(classes_per_batch or len(self._rows), len(self._rows))
        if rows_per_batch < 2 * self._classes or self._classes < 2:
            raise DataError(
                f"expected a global harmful batch with at least two rows for each of at least two classes, got "
                f"{rows_per_batch} rows for {self._classes} classes: raise per_device_harmful_batch_size or lower "
                "harmful_classes_per_batch."
            )
        super().__init__(rows_per_batch, seed, start, rank, world_size, parts)

    def global_batch(self, step: int) -> torch.Tensor:
        """Row indices of the whole batch of one step, over all ranks."""
        generator = self._generator(step)
        classes = torch.randperm(len(self._rows), generator=generator)[: self._classes].tolist()
        parts = []
        for place, label in enumerate(classes):
            rows = self._rows[label]
            share = self._batch // self._classes + (place < self._batch % self._classes)
            if share <= len(rows):
                parts.append(rows[torch.randperm(len(rows), generator=generator)[:share]])
            else:
                parts.append(rows[torch.randint(len(rows), (share,), generator=generator)])
        batch = torch.cat(parts)
        return batch[torch.randperm(len(batch), generator=generator)]
