"""What one pass over a large dataset found, kept on disk: read by one process, once, and found again by all others."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_immunize.data.rows import has_transform, is_table
from hf_immunize.version import __version__

FORMAT = 1
"""Part of every key; raised when what is kept changes its meaning."""
MANY = 2048
"""Rows from which a pass is worth keeping."""


def cache_folder(kind: str) -> Path:
    """``hf_immunize/KIND`` under the Hugging Face cache, or under HF_IMMUNIZE_CACHE."""
    from huggingface_hub import constants

    return Path(os.environ.get("HF_IMMUNIZE_CACHE", Path(constants.HF_HOME) / "hf_immunize")) / kind


def is_shared(rows: int) -> bool:
    """Whether a pass over so many rows is kept: they are many, or several processes would each make it."""
    return rows >= MANY or int(os.environ.get("WORLD_SIZE", "1")) > 1


def identity_of(dataset: Any, column: str, *words: object) -> str | None:
    """A key for what is computed of the images of a ``datasets.Dataset``; None where nobody can know that they changed.

    It holds the dataset's own fingerprint, size and time of every image file that lies outside of it, the versions of
    what decodes, and ``words``.
    """
    if not is_table(dataset) or has_transform(dataset) or column not in dataset.column_names:
        return None
    digest = hashlib.sha256(f"{FORMAT} {dataset._fingerprint} {column} {_versions()} {words!r}".encode())
    for told in _files(dataset, column):
        digest.update(told.encode())
    return digest.hexdigest()[:32]


def _versions() -> tuple[str, ...]:
    import numpy
    import PIL
    import torch
    import transformers

    return (__version__, PIL.__version__, numpy.__version__, torch.__version__, transformers.__version__)


def _files(dataset: Any, column: str, batch: int = 1000) -> Iterator[str]:
    """Path, size and time of the image files that rows name; what is not there, or on a server, by its name alone."""
    from datasets import Image

    if not isinstance(dataset.features[column], Image):
        return
    stored = dataset.with_format(None).select_columns(column).cast_column(column, Image(decode=False))
    for start in range(0, len(stored), batch):
        for value in stored[start : start + batch][column]:
            if not isinstance(value, Mapping) or value.get("bytes") is not None:
                continue
            yield _of_file(str(value.get("path")))


def _of_file(path: str) -> str:
    try:
        found = os.stat(path)
    except OSError:
        return f"{path};"
    return f"{path} {found.st_size} {found.st_mtime_ns};"


def identity_of_files(files: Sequence[Path], *words: object) -> str:
    """A key for what is computed of image files: path, size and time of each, what decodes them, and ``words``."""
    digest = hashlib.sha256(f"{FORMAT} {_versions()} {words!r}".encode())
    for path in files:
        digest.update(_of_file(str(path.absolute())).encode())
    return digest.hexdigest()[:32]


def described_processor(processor: Any) -> str:
    """The settings of an image processor, as far as it tells them."""
    told = processor.to_json_string() if hasattr(processor, "to_json_string") else repr(processor)
    return f"{type(processor).__name__} {told}"


def places(rows: int, batch: int) -> Sequence[range]:
    """The numbers of rows in consecutive batches."""
    return [range(start, min(start + batch, rows)) for start in range(0, rows, batch)]
