"""Rows that cannot be read say which ones they are: images that do not decode, datasets and workers that fail."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch.utils.data import Dataset

from hf_immunize.errors import DataError, WorkerError


def read_image(dataset: Any, row: int, column: str, name: str) -> Any:
    """The RGB image in ``column`` of one row of a ``datasets.Dataset``.

    Raises:
        DataError: what is there cannot be decoded; row, and the file where there is one, are named.
    """
    try:
        return dataset[row][column].convert("RGB")
    except Exception as error:  # Pillow's decoders raise many unrelated classes for a broken file
        raise DataError(
            f"expected an image in row {row} of {name}{_file_of(dataset, row, column)}, got {type(error).__name__}: "
            f"{error}. Remove the row or repair the file."
        ) from error


def _file_of(dataset: Any, row: int, column: str) -> str:
    """`` (path)`` of a row's image, where the dataset was made from files."""
    from datasets import Image

    try:
        stored = dataset.cast_column(column, Image(decode=False))[row][column]
    except Exception:  # the row itself is named already
        return ""
    path = stored.get("path") if isinstance(stored, dict) else None
    return f" ({path})" if path else ""


class NamedRows(Dataset):
    """A map-style dataset whose rows, when reading them fails, are named in the error.

    Raises:
        DataError: when a row is read that the dataset cannot give.
    """

    def __init__(self, rows: Any, name: str):
        self.rows, self.name = rows, name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Any:
        try:
            return self.rows[row]
        except Exception as error:  # whatever a dataset of the user's may raise
            raise DataError(
                f"expected row {row} of {self.name}, got {type(error).__name__}: {error}. Remove the row or repair it."
            ) from error

    def __getitems__(self, rows: Sequence[int]) -> list[Any]:
        """Rows read together where the dataset can; one by one to name the one that fails."""
        if hasattr(self.rows, "__getitems__"):
            try:
                return self.rows.__getitems__(rows)
            except Exception:  # named below
                pass
        return [self[row] for row in rows]


@contextmanager
def named_workers(name: str, timeout: float) -> Iterator[None]:
    """Inside, a data worker that dies, or one of ``name`` that takes longer than ``timeout`` seconds, is a WorkerError.

    A death is noticed wherever the process is, so that ``name`` says what was being read then.
    """
    try:
        yield
    except WorkerError:
        raise
    except RuntimeError as error:
        text = str(error)
        if "timed out" in text and "DataLoader" in text:
            raise WorkerError(
                f"expected a batch of {name} within dataloader_timeout={timeout:g} s, got none: a worker hangs, or one "
                "batch takes longer. Raise dataloader_timeout, or set dataloader_num_workers=0 to see where it stops."
            ) from error
        if "DataLoader worker" in text and ("exited unexpectedly" in text or "is killed by signal" in text):
            raise WorkerError(
                f"expected data workers that stay alive, got one that died while {name} was read: {text.strip()} A "
                "killed worker is most often out of memory: lower dataloader_num_workers, or set it to 0 to see why."
            ) from error
        raise
