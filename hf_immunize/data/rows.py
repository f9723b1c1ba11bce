"""Rows that cannot be read say which ones they are: images that do not decode, datasets and workers that fail."""

from __future__ import annotations

import struct
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers.utils import logging

from hf_immunize.data.images import BACKGROUND, decode_image
from hf_immunize.data.levels import ImageFault, ImageTally
from hf_immunize.errors import DataError, ImmunizeError, WorkerError

logger = logging.get_logger(__name__)

NEVER_WRAPPED = (ImmunizeError, MemoryError, torch.OutOfMemoryError)
_UNREADABLE = (OSError, EOFError, UnicodeError, struct.error, zlib.error, Image.DecompressionBombError)
_MISTAKES = (LookupError, TypeError, AttributeError, NameError, AssertionError, ImportError, NotImplementedError)


def label_key(columns: Iterable[str]) -> str | None:
    """``labels`` or ``label``, whichever is among the columns; None for neither."""
    return next((column for column in ("labels", "label") if column in columns), None)


def check_rows(dataset: Any, name: str) -> None:
    """Raise DataError for what has no numbered rows: a streaming dataset, a dict of splits, an iterator."""
    if isinstance(dataset, Mapping):
        raise DataError(f"expected one dataset as {name}, got a dict of {sorted(map(str, dataset))}: choose a split.")
    if not all(hasattr(type(dataset), method) for method in ("__len__", "__getitem__")):
        raise DataError(
            f"expected rows with numbers in {name}, got {type(dataset).__name__}: they are drawn by number, and labels "
            "are counted first. Load the dataset without streaming=True, or give a list of its rows: "
            "datasets.Dataset.from_list(list(stream.take(10_000)))."
        )


def columns_of(dataset: Any, name: str) -> list[str]:
    """Names of the columns: ``column_names``, or the keys of the first row. Raises DataError for rows without names."""
    check_rows(dataset, name)
    if getattr(dataset, "column_names", None) is not None:
        return list(dataset.column_names)
    return sorted(map(str, as_mapping(fetch(dataset, 0, name), 0, name))) if len(dataset) else []


def values_of(dataset: Any, column: str, name: str) -> list[Any]:
    """One column as it is stored, whatever the format of the rows; read row by row where there are no columns."""
    from datasets import Dataset as Table

    if isinstance(dataset, Table):
        return list(dataset.with_format(None)[column])
    return [as_mapping(fetch(dataset, row, name), row, name)[column] for row in range(len(dataset))]


def as_mapping(row: Any, number: int, name: str) -> Mapping[str, Any]:
    """The row, if it names its parts. Raises DataError for tuples and the like, which do not."""
    if isinstance(row, Mapping):
        return row
    parts = f" of {', '.join(type(part).__name__ for part in row)}" if isinstance(row, tuple | list) else ""
    raise DataError(
        f"expected rows that are dicts in {name}, got a {type(row).__name__}{parts} in row {number}: return "
        "{'pixel_values': image, 'labels': label} from the dataset's __getitem__."
    )


def check_finite(row: Any, number: int, name: str) -> None:
    """Raise DataError for pixels, as a tensor or an array, with a NaN or an infinity: the row is named."""
    pixels = row.get("pixel_values") if isinstance(row, Mapping) else None
    if isinstance(pixels, np.ndarray) and pixels.dtype.kind == "f":
        pixels = torch.as_tensor(np.ascontiguousarray(pixels))
    if not isinstance(pixels, torch.Tensor) or not pixels.is_floating_point():
        return
    # One bad pixel makes the sum no number, and a sum is several times as fast as a look at each.
    if not bool(pixels.sum().isfinite()) and not bool(pixels.isfinite().all()):
        raise DataError(
            f"expected finite pixels in {name}, got NaN or infinity in row {number}: remove the image, or check the "
            "image processor's mean and standard deviation."
        )


def fetch(dataset: Any, row: int, name: str) -> Any:
    """``dataset[row]``, whose failures name the row and say whose they are.

    Raises:
        DataError: the dataset raised something, which is its cause: a row that cannot be read (missing or broken
            files), or an error of the dataset's own code, whose class and message come first then.
    """
    try:
        return dataset[row]
    except NEVER_WRAPPED:
        raise
    except Exception as error:
        raise named_error(error, row, name) from error


def named_error(error: Exception, row: int, name: str) -> DataError:
    """What a dataset raised when it was asked for a row, as an error that names the row and says whose fault it is."""
    what = f"{type(error).__name__}: {error}"
    last = traceback.extract_tb(error.__traceback__)[-1]
    decoding = not isinstance(error, _MISTAKES) and "/PIL/" in last.filename.replace("\\", "/")
    if isinstance(error, _UNREADABLE) or decoding:
        return DataError(f"expected row {row} of {name}, got {what}. Remove the row or repair it.")
    place = "" if last.filename == __file__ else f" ({last.filename}, line {last.lineno}, in {last.name})"
    asked = f"{what}. The code of {name} raised this when it was asked for row {row}{place}"
    if isinstance(error, _MISTAKES):
        return DataError(f"{asked}: it is no fault of the row. Mend the dataset's __getitem__ or its transform.")
    return DataError(f"{asked}: repair the row, or the code.")


def read_image(
    dataset: Any, row: int, column: str, name: str, *, mode: str = "RGB",
    background: str | tuple[int, int, int] = BACKGROUND, tally: ImageTally | None = None,
) -> Image.Image:
    """The image in ``column`` of one row as 8-bit RGB or grey, see ``decode_image`` for what may be there.

    Images of a ``datasets.Dataset`` are decoded from their files, whatever the format (torch, numpy, …) of its rows;
    where it has a transform, what that makes of the row counts.

    Raises:
        DataError: what is there cannot be decoded; row, and the file where there is one, are named.
    """
    stored = _stored(dataset, column)
    found = as_mapping(fetch(dataset if stored is None else stored.rows, row, name), row, name)
    if column not in found:
        raise DataError(
            f"expected column '{column}' in row {row} of {name}, got {sorted(map(str, found))}: set image_column, or "
            "take the transform off with dataset.with_format(None)."
        )
    value = found[column]
    try:
        if stored is not None and stored.grey:
            return decode_image(value, "L", background=background, tally=tally).convert(mode)
        return decode_image(value, mode, background=background, tally=tally)
    except ImageFault as fault:
        raise DataError(f"expected an image in row {row} of {name}{_file_of(value)}, got {fault.told}.") from fault


def place_of(dataset: Any, row: int, column: str, name: str) -> str:
    """``row 3 (path)``: a row of images, with the file where there is one."""
    stored = _stored(dataset, column)
    return f"row {row}" if stored is None else f"row {row}{_file_of(fetch(stored.rows, row, name)[column])}"


def _file_of(value: Any) -> str:
    """`` (path)`` of what a row stores as an image."""
    path = value.get("path") if isinstance(value, Mapping) else getattr(value, "filename", value)
    return f" ({path})" if isinstance(path, str | PathLike) and str(path) else ""


@dataclass(frozen=True)
class _Stored:
    """The rows of a ``datasets.Dataset`` with an image as it is stored, and whether its feature asks for grey."""

    rows: Any
    grey: bool


_STORED: WeakKeyDictionary[Any, dict[str, _Stored | None]] = WeakKeyDictionary()
"""By dataset and column: a view takes as long to make as several rows to read."""


def _stored(dataset: Any, column: str) -> _Stored | None:
    """None for what is no column of images of a ``datasets.Dataset``, or where a transform makes the rows."""
    from datasets import Dataset as Table
    from datasets import Image as Feature

    if not isinstance(dataset, Table) or has_transform(dataset):
        return None
    views = _STORED.setdefault(dataset, {})
    if column not in views:
        feature, views[column] = dataset.features.get(column), None
        if isinstance(feature, Feature):
            rows = dataset.with_format(None).select_columns(column).cast_column(column, Feature(decode=False))
            views[column] = _Stored(rows, feature.mode in ("1", "L"))
    return views[column]


def is_table(dataset: Any) -> bool:
    """Whether it is a ``datasets.Dataset``, whose columns can be read without decoding images."""
    from datasets import Dataset as Table

    return isinstance(dataset, Table)


def has_transform(dataset: Any) -> bool:
    """Whether ``with_transform`` or ``set_transform`` makes the rows of a ``datasets.Dataset`` what they are."""
    made = getattr(dataset, "format", None)
    return isinstance(made, Mapping) and made.get("type") == "custom"


class NamedRows(Dataset[Any]):
    """A map-style dataset whose rows, when reading them fails, are named in the error.

    Args:
        rows: the dataset.
        name: what to call it in errors.
        check: called with each row, its number and ``name``; raises where the row cannot be used.

    Raises:
        DataError: for a dataset without numbered rows; and when a row is read that the dataset cannot give, see
            ``fetch``, or whose pixels are not finite.
    """

    def __init__(self, rows: Any, name: str, check: Callable[[Any, int, str], None] | None = None):
        check_rows(rows, name)
        self.rows, self.name, self._check = rows, name, check

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Any:
        return self._checked(fetch(self.rows, row, self.name), row)

    def _checked(self, found: Any, row: int) -> Any:
        check_finite(found, row, self.name)
        if self._check is not None:
            self._check(found, row, self.name)
        return found

    def __getitems__(self, rows: Sequence[int]) -> list[Any]:
        """Rows read together where the dataset can; one by one to name the one that fails."""
        if hasattr(self.rows, "__getitems__"):
            try:
                together = self.rows.__getitems__(rows)
            except NEVER_WRAPPED:
                raise
            except Exception as error:
                found = [self[row] for row in rows]  # names the row that fails
                logger.warning_once(
                    f"{self.name} fails when several rows are asked for together, and is read one by one: "
                    f"{type(error).__name__}: {error}"
                )
                return found
            return [self._checked(found, row) for found, row in zip(together, rows, strict=True)]
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
