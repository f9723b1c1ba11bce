"""This rank's harmful batch of any micro-step, loaded ahead by workers as long as steps are asked for in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from hf_immunize.data import (
    NamedRows,
    NamedStream,
    RankBatches,
    RowBatchSampler,
    StepBatchSampler,
    StepSampler,
    named_workers,
)
from hf_immunize.errors import ConfigError, DataError
from hf_immunize.training.vision.harmful_loss import WithAnswers
from hf_immunize.training.vision.harmful_task import HarmfulTask, WithoutTargets
from hf_immunize.training.vision.loading import LoaderOptions


class HarmfulStream:
    """Random access by micro-step.

    Rows with classes are drawn by StepBatchSampler, others by RowBatchSampler; both are pure functions of (seed, step).
    A stream's batches are taken as they come: step s is its batch s, reached by reading what lies before it.

    The loader has a generator of its own, so that making it anew on resume draws nothing from the global one.

    Args:
        parts: micro-batches of an optimizer step, whose rows are drawn together.
        answers: whether batches are for a simulated attacker, and have what its head is to answer.

    Raises:
        DataError: a batch that cannot hold what the terms need.
        ConfigError: classes per batch for rows that have none, or that cannot be chosen.
    """

    def __init__(
        self,
        task: HarmfulTask,
        collate: Callable[..., Any],
        *,
        rows_per_device: int,
        classes_per_batch: int | None,
        seed: int,
        rank: int,
        world_size: int,
        parts: int = 1,
        options: LoaderOptions | None = None,
        answers: bool = False,
    ):
        self._task, self._options = task, options or LoaderOptions()
        self._given, self._answers = collate, answers
        self._collate = self._collating()
        self._rows, self._classes, self._parts = rows_per_device * world_size, classes_per_batch, parts
        self._seed, self._rank, self._world = seed, rank, world_size
        self._sampler: StepSampler | None = None
        self._loader: DataLoader[Any] | None = None
        self._iterator: Iterator[Any] | None = None
        self._next = -1
        if classes_per_batch is not None and (task.is_stream or task.kind != "classes"):
            raise ConfigError(
                f"expected no harmful_classes_per_batch for {task.name}, "
                f"{'a stream, whose rows come as they are' if task.is_stream else 'whose rows have no class'}, got "
                f"{classes_per_batch}: leave it out."
            )
        if task.is_stream and self._rows < 2:
            raise DataError("expected a global harmful batch of at least two rows, got 1: raise "
                            "per_device_harmful_batch_size.")
        if task.targets is not None:
            self.prepare()  # raises now rather than at the first step

    @classmethod
    def of(cls, args: Any, task: HarmfulTask, collate: Callable[..., Any], *, answers: bool = False) -> HarmfulStream:
        """The rows that a run with these options draws, those of its simulated attackers by seeds of their own.

        An attacker's step has as many rows as the optimizer step that it is simulated in.
        """
        seed = args.seed if args.data_seed is None else args.data_seed
        parts, rows = args.gradient_accumulation_steps, args.per_device_harmful_batch_size
        return cls(
            task,
            collate,
            rows_per_device=parts * rows if answers else rows,
            parts=1 if answers else parts,
            classes_per_batch=args.harmful_classes_per_batch,
            seed=seed + 1_000_003 if answers else seed,
            rank=args.process_index,
            world_size=args.world_size,
            options=LoaderOptions.of(args),
            answers=answers,
        )

    def _collating(self) -> Callable[..., Any]:
        """How rows with such labels become a batch."""
        if self._answers:
            return WithAnswers(self._given, self._task.asks, self._task.key)
        return self._given if self._task.kind == "classes" else WithoutTargets(self._given)

    def prepare(self) -> None:
        """Choose how rows are drawn; what the labels are has to be known by now, or is counted."""
        if self._task.is_stream or self._sampler is not None:
            return
        labels = self._task.labels
        place = {"seed": self._seed, "rank": self._rank, "world_size": self._world, "parts": self._parts}
        rows = self._rows * self._parts
        if self._task.kind == "classes" and len(labels.unique()) > 1:
            self._sampler = StepBatchSampler(labels.tolist(), rows, classes_per_batch=self._classes, **place)
        else:
            self._sampler = RowBatchSampler(len(labels), rows, **place)
        self._collate = self._collating()  # counting may have shown that labels are no classes, or only one

    def batch(self, step: int) -> Any:
        """The batch of micro-step ``step``, collated, on the CPU.

        Raises:
            DataError: a row that cannot be read.
            WorkerError: a worker that died or took too long.
        """
        with named_workers(self._task.name, self._options.timeout):
            if self._iterator is None or step != self._next:
                self._iterator = self._from(step)
            self._next = step + 1
            return next(self._iterator)

    def _from(self, step: int) -> Iterator[Any]:
        """Batches from a step on. Workers that are to persist are asked again; those of a stream begin anew."""
        if self._task.is_stream:
            rows = NamedStream(self._task.rows, self._task.name, repeat=True, check=self._task.check_row)
            batches = RankBatches(rows, self._collate, self._rows, self._rank, self._world, skip=step)
            self._loader = DataLoader(batches, batch_size=None, generator=self._generator(step), **self._options.words)
            iterator = iter(self._loader)
            for _ in range(step):
                next(iterator)
            return iterator
        self.prepare()
        assert self._sampler is not None
        self._sampler.start = step
        if self._loader is None:
            self._loader = DataLoader(
                NamedRows(self._task.rows, self._task.name, self._task.check_row), batch_sampler=self._sampler,
                collate_fn=self._collate, generator=self._generator(step), **self._options.words,
            )
        self._loader.generator.manual_seed(step)
        return iter(self._loader)

    @staticmethod
    def _generator(step: int) -> torch.Generator:
        return torch.Generator().manual_seed(step)
