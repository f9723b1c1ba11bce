"""Rows of tensors on disk: written once, atomically, and read through memory maps."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from hf_immunize.errors import RecordError
from hf_immunize.records import atomic_write

_INDEX = "index.json"


class RowStore:
    """Columns of equally many rows in one folder, one raw file per column, mapped into memory when read.

    A store is complete or it is not there: columns are written to a folder beside it, which is renamed when every file
    is on disk. A folder that a killed writer left is removed by the next writer of the same store. Writers of one
    store exclude each other by a file lock that the system releases when its holder dies.
    """

    def __init__(self, folder: Path, columns: list[Tensor]):
        self.folder, self._columns = folder, columns

    def __len__(self) -> int:
        return len(self._columns[0])

    def __getitem__(self, row: int) -> tuple[Tensor, ...]:
        return tuple(column[row] for column in self._columns)

    def column(self, place: int) -> Tensor:
        """One column of all rows, mapped into memory: nothing is read before it is looked at."""
        return self._columns[place]

    @property
    def width(self) -> int:
        """How many columns there are."""
        return len(self._columns)

    @classmethod
    def open(cls, folder: str | Path) -> RowStore | None:
        """The store in ``folder``; None when there is none.

        Raises:
            RecordError: files that are not what the index says.
        """
        root = Path(folder)
        try:
            index = json.loads((root / _INDEX).read_text(encoding="utf-8"))
        except OSError:
            return None
        except ValueError as error:
            raise _damaged(root, f"an unreadable {_INDEX}: {error}") from error
        columns = []
        for place, (shape, dtype) in enumerate(index["columns"]):
            kind, file = getattr(torch, dtype), _file(root, place)
            size = prod(shape) * kind.itemsize
            found = file.stat().st_size if file.exists() else 0
            if found != size:
                raise _damaged(root, f"{found} bytes in {file.name} instead of {size}")
            columns.append(torch.from_file(str(file), shared=False, size=prod(shape), dtype=kind).view(shape))
        return cls(root, columns)

    @classmethod
    def open_or_write(cls, folder: str | Path, batches: Iterable[tuple[Tensor, ...]], rows: int) -> RowStore:
        """The store in ``folder``, written from ``batches`` (of ``rows`` rows in all) if it is not there yet.

        ``batches`` is read only by the one process that writes; others wait for it.

        Raises:
            RecordError: no space, a folder that cannot be written, or batches that are not ``rows`` rows.
        """
        root = Path(folder)
        try:
            root.parent.mkdir(parents=True, exist_ok=True)
            with _locked(root.with_name(f"{root.name}.lock")):
                if (found := cls.open(root)) is None:
                    for left in root.parent.glob(f"{root.name}.*.part"):
                        shutil.rmtree(left)
                    _write(root, batches, rows)
                    found = cls.open(root)
        except OSError as error:
            raise RecordError(
                f"expected to write {root}, got {error.strerror or error}: free disk space or choose another folder."
            ) from error
        assert found is not None
        return found


def _write(root: Path, batches: Iterable[tuple[Tensor, ...]], rows: int) -> None:
    part = Path(tempfile.mkdtemp(dir=root.parent, prefix=f"{root.name}.", suffix=".part"))
    files: list[BinaryIO] = []
    shapes: list[tuple[list[int], str]] = []
    written = 0
    try:
        for batch in batches:
            if not files:
                _check_space(part, batch, rows)
                files = [_file(part, place).open("wb") for place in range(len(batch))]
                shapes = [([rows, *c.shape[1:]], str(c.dtype).removeprefix("torch.")) for c in batch]
            for file, column in zip(files, batch, strict=True):
                file.write(column.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            written += len(batch[0])
        if written != rows:
            raise RecordError(f"expected {rows} rows for {root.name}, got {written}: the dataset changed while read.")
        for file in files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        atomic_write(part / _INDEX, json.dumps({"columns": shapes}))
        os.replace(part, root)
    finally:
        for file in files:
            file.close()
        shutil.rmtree(part, ignore_errors=True)


def _check_space(part: Path, batch: tuple[Tensor, ...], rows: int) -> None:
    needed = sum(rows * column[0].numel() * column.element_size() for column in batch)
    free = shutil.disk_usage(part).free
    if needed > free:
        raise RecordError(
            f"expected {needed / 2**30:.1f} GiB for frozen features in {part.parent}, got {free / 2**30:.1f} GiB free: "
            "set feature_cache_dir to a larger disk, or cache_frozen_features to false."
        )


def _file(root: Path, place: int) -> Path:
    return root / f"column-{place}.raw"


def _damaged(root: Path, what: str) -> RecordError:
    return RecordError(f"expected a complete feature cache in {root}, got {what}: delete the folder.")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file lock; where the system has none (Windows) only the atomic rename protects readers."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(stream, fcntl.LOCK_UN)
