"""Datasets without numbered rows: torch's and ``datasets``' ``IterableDataset``, read in their own order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from hf_immunize.data.rows import NEVER_WRAPPED, as_mapping, check_finite, check_rows, fetch, named_error
from hf_immunize.errors import DataError


def is_stream(dataset: Any) -> bool:
    """Whether it is an ``IterableDataset`` of torch or of ``datasets`` (``load_dataset(..., streaming=True)``)."""
    from datasets import IterableDataset as Stream

    return isinstance(dataset, IterableDataset | Stream)


def check_source(dataset: Any, name: str) -> None:
    """Raise DataError for what has neither numbered rows nor can be read again from its start."""
    if not is_stream(dataset):
        check_rows(dataset, name)


def first_row(dataset: Any, name: str) -> Mapping[str, Any]:
    """The first row, and no other one.

    Raises:
        DataError: no rows, one that cannot be read, or one that is no dict.
    """
    if not is_stream(dataset):
        if len(dataset) == 0:
            raise DataError(f"expected at least one row in {name}, got an empty dataset: check its split and filter.")
        return as_mapping(fetch(dataset, 0, name), 0, name)
    found = next(iter(NamedStream(dataset, name, limit=1)), None)
    if found is None:
        raise DataError(f"expected at least one row in {name}, got an empty stream: check its split and filter.")
    return as_mapping(found, 0, name)


class NamedStream(IterableDataset[Any]):
    """Rows of an iterable dataset, which are named in the error when reading them fails.

    Args:
        rows: an ``IterableDataset``; in data workers it yields this worker's share, as in any DataLoader.
        name: what to call it in errors.
        repeat: begin again after the last row, with ``set_epoch(1)``, ``set_epoch(2)``, … where the dataset has it.
        check: called with each row, its number and ``name``; raises where the row cannot be used.
        limit: rows after which it ends.

    Raises:
        DataError: a row that cannot be read, see ``fetch``, or whose pixels are not finite; ``repeat`` without a row.
    """

    def __init__(
        self, rows: Any, name: str, *, repeat: bool = False,
        check: Callable[[Any, int, str], None] | None = None, limit: int | None = None,
    ):  # fmt: skip
        self.rows, self.name, self.repeat, self._check, self._limit = rows, name, repeat, check, limit

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self._rows(), self._limit)

    def _rows(self) -> Iterator[Any]:
        for epoch in itertools.count():
            if hasattr(self.rows, "set_epoch"):
                self.rows.set_epoch(epoch)
            any_row = False
            for row in self._once():
                any_row = True
                yield row
            if not self.repeat:
                return
            if not any_row:
                info = get_worker_info()
                if info is not None and info.id > 0:
                    return  # fewer shards than workers: the others have the rows
                raise DataError(f"expected at least one row in {self.name}, got an empty stream: check its split.")

    def _once(self) -> Iterator[Any]:
        number = 0
        rows = iter(self.rows)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except NEVER_WRAPPED:
                raise
            except Exception as error:
                raise named_error(error, number, self.name) from error
            check_finite(row, number, self.name)
            if self._check is not None:
                self._check(row, number, self.name)
            yield row
            number += 1


class RankBatches(IterableDataset[Any]):
    """This rank's rows of consecutive global batches of a stream: rows r, r+W, r+2W, … of each batch, collated.

    So the global batch of a step is the same on any number of processes. Every rank reads the whole stream. With
    workers, batches are taken from each in turn.

    Args:
        stream: endless.
        collate: of one rank's rows.
        rows_per_batch: of the *global* batch.
        skip: how many of the first batches nobody needs: they come as None, read but not collated, as far as this
            worker can know that they are among them.
    """

    def __init__(
        self,
        stream: NamedStream,
        collate: Callable[..., Any],
        rows_per_batch: int,
        rank: int,
        world_size: int,
        skip: int = 0,
    ):
        self._stream, self._collate, self._batch = stream, collate, rows_per_batch
        self._rank, self._world, self._skip = rank, world_size, skip

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        idle = self._skip // (1 if info is None else info.num_workers)
        held: list[Any] = []
        for number, row in enumerate(self._stream):
            batch, place = divmod(number, self._batch)
            if batch >= idle and place % self._world == self._rank:
                held.append(row)
            if place == self._batch - 1:
                yield self._collate(held) if held else None
                held = []
