"""Content digests of rows and splits."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_immunize.data.caching import cache_folder, is_shared
from hf_immunize.data.pixels import ImagePixels, PixelDataset
from hf_immunize.data.row_store import RowStore
from hf_immunize.data.rows import NamedRows
from hf_immunize.records import DatasetFingerprint


def digest_pixels(pixels: Any) -> bytes:
    """SHA-256 over the shape, dtype and values of one array-like image."""
    array = np.ascontiguousarray(pixels)
    digest = hashlib.sha256(f"{array.shape}{array.dtype}".encode())
    digest.update(array.tobytes())
    return digest.digest()


def digest_tensor(tensor: torch.Tensor) -> bytes:
    """SHA-256 over the shape, dtype and values of a tensor: ``digest_pixels``, also where numpy has no such dtype."""
    held = tensor.detach().cpu().contiguous()
    if held.dtype != torch.bfloat16:
        return digest_pixels(held.numpy())
    return digest_pixels(held.view(torch.int16).numpy()) + b"bfloat16"


def as_rows(digests: Sequence[bytes]) -> Tensor:
    """N digests as N×32 uint8."""
    return torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).reshape(len(digests), -1)


def as_digests(rows: Tensor) -> list[bytes]:
    """What ``as_rows`` made rows of."""
    return [row.tobytes() for row in rows.numpy()]


def digest_rows(dataset: Any, name: str) -> str:
    """Hex SHA-256 over the pixels of every row of any map-style dataset, in order; each row is read once."""
    digest = hashlib.sha256()
    for each in _row_digests(dataset, name):
        digest.update(each)
    return digest.hexdigest()


def _row_digests(dataset: Any, name: str) -> Iterator[bytes]:
    """``digest_pixels`` of every row, in order. Those of images that are decoded when read are kept on disk."""
    if isinstance(dataset, ImagePixels) and dataset.identity is not None and is_shared(len(dataset)):
        folder = cache_folder("digests") / dataset.identity
        batches = ((as_rows(part),) for part in _hashed_blocks(dataset, name))
        yield from as_digests(RowStore.open_or_write(folder, batches, len(dataset)).column(0))
    elif isinstance(dataset, PixelDataset):
        for part in _hashed_blocks(dataset, name):
            yield from part
    else:
        rows = NamedRows(dataset, name)
        for row in tqdm(range(len(rows)), desc=f"hash of {name}", leave=False, disable=None):
            yield digest_pixels(torch.as_tensor(rows[row]["pixel_values"]).numpy())


def _hashed_blocks(dataset: PixelDataset, name: str) -> Iterator[list[bytes]]:
    with tqdm(total=len(dataset), desc=f"hash of {name}", unit="row", leave=False, disable=None) as bar:
        for block in dataset.blocks():
            yield [digest_pixels(pixels) for pixels in block.numpy()]
            bar.update(len(block))


def fingerprint(dataset: PixelDataset, *, source: str, role: str) -> DatasetFingerprint:
    """Fingerprint of a split: digests of every row's pixels and label, in order."""
    digest = hashlib.sha256()
    for pixels, label in zip(_row_digests(dataset, dataset.name), dataset.labels.tolist(), strict=True):
        digest.update(pixels)
        digest.update(str(label).encode())
    counts = Counter(dataset.labels.tolist())
    classes = {name: counts.get(label, 0) for label, name in enumerate(dataset.label_names)}
    return DatasetFingerprint(source=source, role=role, rows=len(dataset), classes=classes, sha256=digest.hexdigest())
