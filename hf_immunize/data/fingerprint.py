"""Content digests of rows and splits."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from hf_immunize.data.pixels import PixelDataset
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


def digest_rows(dataset: Any, name: str) -> str:
    """Hex SHA-256 over the pixels of every row of any map-style dataset, in order; each row is read once."""
    digest = hashlib.sha256()
    if isinstance(dataset, PixelDataset):
        for pixels in dataset.pixel_values.numpy():
            digest.update(digest_pixels(pixels))
        return digest.hexdigest()
    rows = NamedRows(dataset, name)
    for row in tqdm(range(len(rows)), desc=f"hash of {name}", leave=False, disable=None):
        digest.update(digest_pixels(torch.as_tensor(rows[row]["pixel_values"]).numpy()))
    return digest.hexdigest()


def fingerprint(dataset: PixelDataset, *, source: str, role: str) -> DatasetFingerprint:
    """Fingerprint of a split: digests of every row's pixels and label, in order."""
    digest = hashlib.sha256()
    for pixels, label in zip(dataset.pixel_values.numpy(), dataset.labels.tolist(), strict=True):
        digest.update(digest_pixels(pixels))
        digest.update(str(label).encode())
    counts = Counter(dataset.labels.tolist())
    classes = {name: counts.get(label, 0) for label, name in enumerate(dataset.label_names)}
    return DatasetFingerprint(source=source, role=role, rows=len(dataset), classes=classes, sha256=digest.hexdigest())
