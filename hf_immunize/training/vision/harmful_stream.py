"""This rank's harmful batch of any micro-step, loaded ahead by workers as long as steps are asked for in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from hf_immunize.data import NamedRows, StepBatchSampler, named_workers


class HarmfulStream:
    """Random access by micro-step over StepBatchSampler.

    The loader has a generator of its own, so that making it anew on resume draws nothing from the global one.
    """

    def __init__(
        self,
        dataset: Any,
        labels: Sequence[int],
        collate: Callable[..., Any],
        *,
        rows_per_device: int,
        classes_per_batch: int | None,
        seed: int,
        rank: int,
        world_size: int,
        workers: int = 0,
        timeout: float = 0.0,
    ):
        self._dataset, self._collate = NamedRows(dataset, "harmful_dataset"), collate
        self._workers, self._timeout = workers, timeout if workers else 0.0
        self._labels = labels
        self._options = {
            "rows_per_batch": rows_per_device * world_size,
            "seed": seed,
            "classes_per_batch": classes_per_batch,
            "rank": rank,
            "world_size": world_size,
        }
        StepBatchSampler(self._labels, **self._options)  # raises now rather than at the first step
        self._iterator: Iterator[Any] | None = None
        self._next = -1

    def batch(self, step: int) -> Any:
        """The batch of micro-step ``step``, collated, on the CPU.

        Raises:
            DataError: a row that cannot be read.
            WorkerError: a worker that died or took too long.
        """
        if self._iterator is None or step != self._next:
            sampler = StepBatchSampler(self._labels, start=step, **self._options)
            loader = DataLoader(
                self._dataset,
                batch_sampler=sampler,
                collate_fn=self._collate,
                num_workers=self._workers,
                timeout=self._timeout,
                generator=torch.Generator().manual_seed(step),
            )
            with named_workers("harmful_dataset", self._timeout):
                self._iterator = iter(loader)
        self._next = step + 1
        with named_workers("harmful_dataset", self._timeout):
            return next(self._iterator)
