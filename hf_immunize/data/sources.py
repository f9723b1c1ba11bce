"""Any image dataset by one name: a Hub id, a folder of images, local parquet files, or an in-memory builder."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_immunize.errors import DataError


def digits() -> Any:
    """scikit-learn's 1797 handwritten digits (8×8, UCI Optical Recognition) as a ``datasets.Dataset``."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("expected scikit-learn for 'builder:digits': pip install hf_immunize[demo].") from error
    import numpy as np
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as PILImage

    loaded = load_digits()
    images = [PILImage.fromarray(np.round(image * 255 / 16).astype(np.uint8)) for image in loaded.images]
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    return Dataset.from_dict({"image": images, "label": loaded.target.tolist()}, features=features)


BUILDERS: dict[str, Callable[[], Any]] = {"digits": digits}


def load_source(source: str, *, config: str | None = None, split: str = "train", revision: str | None = None) -> Any:
    """Load one split as a ``datasets.Dataset``.

    Args:
        source: ``builder:NAME`` (a key of BUILDERS) or ``builder:module:function`` returning a Dataset; a folder with
            one sub-folder of images per class; a ``.parquet`` file or a folder of them; else a Hub id.
        config, split, revision: as in ``datasets.load_dataset``.

    Raises:
        DataError: a source that cannot be found or read.
    """
    if source.startswith("builder:"):
        return _build(source.removeprefix("builder:"))
    from datasets import load_dataset

    path = Path(source)
    try:
        if path.suffix == ".parquet" or (path.is_dir() and any(path.glob("*.parquet"))):
            files = str(path) if path.is_file() else sorted(str(file) for file in path.glob("*.parquet"))
            return load_dataset("parquet", data_files=files, split="train")
        if path.is_dir():
            return load_dataset("imagefolder", data_dir=str(path), split=split)
        return load_dataset(source, config, split=split, revision=revision)
    except Exception as error:  # datasets raises many unrelated classes for "cannot be found or read"
        raise DataError(
            f"expected a Hub id, an image folder, a parquet file or builder:NAME, got {source!r} (split {split!r}): "
            f"{type(error).__name__}: {error}"
        ) from error


def _build(name: str) -> Any:
    if name in BUILDERS:
        return BUILDERS[name]()
    module, _, function = name.partition(":")
    if not function:
        raise DataError(f"expected builder:NAME, NAME in {sorted(BUILDERS)}, or builder:module:function, got {name!r}.")
    try:
        return getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise DataError(f"expected an importable function for builder:{name}, got {error}.") from error


def describe_source(source: str) -> str:
    """A name for records and cards that gives away no local path: the last path component of a local source."""
    return source if source.startswith("builder:") or not Path(source).exists() else Path(source).name
