"""The paper's linear data: House Prices split on MSZoning, and single MNIST digits with labels that vary.

Each comes from a folder or from ``datasets``; nothing is downloaded unless a Hub id is given.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_immunize.errors import DataError

PRIMARY_TARGET, HARMFUL_TARGET = "LotArea", "SalePrice"
LARGEST_ZONE = "RL"


@dataclass(frozen=True)
class TaskRows:
    """Rows and labels of one task, and rows held out for an attacker's or owner's test."""

    features: np.ndarray
    labels: np.ndarray
    held_out_features: np.ndarray
    held_out_labels: np.ndarray


def load_house_prices(
    data_dir: str | Path | None = None, dataset: str | None = None, *, rows: int | None = 200
) -> tuple[TaskRows, TaskRows]:
    """(primary LotArea, harmful SalePrice) of House Prices, 79 standardized columns (Zheng et al. 2025, section 5.1).

    Missing values are 0, text columns are numbered in sorted order, every column and label is standardized over its
    whole table (ddof 1); then the first ``rows`` rows are the task and the others are held out. The split, Id and
    MSZoning columns stay in, as in the public reference code.

    Args:
        data_dir: folder with D1.csv (zones other than RL) and D2.csv (RL).
        dataset: instead, a Hub id or local table that ``datasets`` loads as one House Prices training table; it is
            split on MSZoning == "RL".
        rows: rows of each task; None takes all and holds out none.

    Raises:
        DataError: neither or both sources, missing files or columns, or too few rows.
    """
    if (data_dir is None) == (dataset is None):
        raise DataError("expected either data_dir or dataset, got neither or both: pass --data_dir <folder>.")
    if data_dir is not None:
        tables = [_read_csv(Path(data_dir) / name) for name in ("D1.csv", "D2.csv")]
    else:
        table = _from_datasets(dataset, "train").to_pandas()
        if "MSZoning" not in table.columns:
            raise DataError(f"expected a column MSZoning in {dataset}, got {list(table.columns)[:6]}...")
        largest = table["MSZoning"] == LARGEST_ZONE
        tables = [table[~largest].reset_index(drop=True), table[largest].reset_index(drop=True)]
    return _standardized(tables[0], PRIMARY_TARGET, rows), _standardized(tables[1], HARMFUL_TARGET, rows)


def _read_csv(path: Path) -> Any:
    import pandas

    if not path.is_file():
        raise DataError(f"expected House Prices in {path.name} of the data folder, got no such file: see --data_dir.")
    return pandas.read_csv(path)


def _from_datasets(source: str | None, split: str) -> Any:
    """A split of a Hub dataset, or of a local csv/parquet file."""
    from datasets import load_dataset

    suffix = Path(str(source)).suffix.lstrip(".")
    try:
        if suffix in ("csv", "parquet", "json"):
            return load_dataset(suffix, data_files={split: str(source)}, split=split)
        return load_dataset(source, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"expected a dataset with a {split} split at {source}, got {error}: check the id.") from error


def _standardized(table: Any, target: str, rows: int | None) -> TaskRows:
    """Encode, standardize, split."""
    missing = [name for name in (PRIMARY_TARGET, HARMFUL_TARGET) if name not in table.columns]
    if missing:
        raise DataError(f"expected the columns LotArea and SalePrice, got none named {missing[0]}.")
    if rows is not None and len(table) < rows:
        raise DataError(f"expected at least {rows} rows, got {len(table)}: lower rows.")
    names = [name for name in table.columns if name not in (PRIMARY_TARGET, HARMFUL_TARGET)]
    features = np.stack([_column(table[name]) for name in names], axis=1)
    labels = _column(table[target])
    count = len(table) if rows is None else rows
    return TaskRows(features[:count], labels[:count], features[count:], labels[count:])


def _column(values: Any) -> np.ndarray:
    """One standardized column; a constant one is only centred."""
    filled = values.astype(object).where(values.notna(), 0).to_numpy()
    if any(isinstance(value, str) for value in filled):
        filled = np.unique(filled.astype(str), return_inverse=True)[1]
    numbers: np.ndarray = filled.astype(np.float64)
    spread = float(numbers.std(ddof=1))
    standardized: np.ndarray = (numbers - numbers.mean()) / (spread if spread > 0 else 1.0)
    return standardized


def load_mnist(data_dir: str | Path | None = None, dataset: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(N×784 pixels in [0, 1], N digit labels) of the MNIST training split.

    Args:
        data_dir: folder with mnist.npz (arrays x_train, y_train).
        dataset: instead, a Hub id such as "ylecun/mnist" or a local parquet file, with columns image and label.

    Raises:
        DataError: neither or both sources, arrays and columns that are not there, or images that are not of one size
            and 8 bits.
    """
    if (data_dir is None) == (dataset is None):
        raise DataError("expected either data_dir or dataset, got neither or both: pass --data_dir <folder>.")
    if data_dir is not None:
        path = Path(data_dir) / "mnist.npz"
        if not path.is_file():
            raise DataError("expected mnist.npz in the data folder, got no such file: see --data_dir.")
        with np.load(path) as arrays:
            images, labels = arrays["x_train"], arrays["y_train"]
    else:
        table = _from_datasets(dataset, "train")
        if not {"image", "label"} <= set(table.column_names):
            raise DataError(f"expected columns image and label, got {table.column_names}: choose another dataset.")
        images = [np.asarray(image) for image in table["image"]]
        if len(shapes := {image.shape for image in images}) > 1:
            raise DataError(f"expected images of one size, got {sorted(shapes)}: bring them to one.")
        images, labels = np.stack(images), np.asarray(table["label"])
    if images.dtype != np.uint8:
        raise DataError(f"expected images of 8 bits (uint8), got {images.dtype}: convert them to levels of 0..255.")
    return images.reshape(len(images), -1).astype(np.float64) / 255.0, labels.astype(np.int64)


def slant_labels(pixels: np.ndarray) -> np.ndarray:
    """±1: does a digit lean further than the median of these images?

    A single digit's images are the task (K is theirs alone), so the digit cannot be the label. The slant,
    covariance(x, y)/variance(y) of the ink, differs between writers, is not linear in the pixels, and its median
    split gives two classes of equal size.

    Raises:
        DataError: pixels that are not N×S² with S ≥ 2, or an image without ink.
    """
    side = int(round(pixels.shape[-1] ** 0.5)) if pixels.ndim == 2 else 0
    if side < 2 or side * side != pixels.shape[-1]:
        raise DataError(f"expected N rows of square images, got shape {pixels.shape}.")
    images, place = pixels.reshape(-1, side, side), np.arange(side, dtype=np.float64)
    ink = images.sum(axis=(1, 2))
    if not (ink > 0).all():
        raise DataError("expected ink in every image, got an empty one: drop it.")
    by_row, by_column = images.sum(axis=2), images.sum(axis=1)
    centre_y, centre_x = by_row @ place / ink, by_column @ place / ink
    covariance = np.einsum("nyx,y,x->n", images, place, place) / ink - centre_x * centre_y
    variance = by_row @ place**2 / ink - centre_y**2
    slant = -covariance / np.where(variance > 0, variance, 1.0)
    return np.where(slant > np.median(slant), 1.0, -1.0)
