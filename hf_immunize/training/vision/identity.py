"""What a checkpoint belongs to: the model before immunization and the rows, each by a digest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hf_immunize.data import NamedRows, PixelDataset, is_stream
from hf_immunize.training.core.sharding import whole
from hf_immunize.training.core.state import ABSENT
from hf_immunize.training.vision.counting import digest_once, read_once

_COMPARED = (
    "objective", "sites", "site_weights", "site_layouts", "feature_module", "horizon", "memorization",
    "harmful_group_rows", "attacker_steps", "attacker_rank", "attacker_head", "attacker_depths", "guard_metric",
)  # fmt: skip
_ROWS, _READINGS = 8, 3
"""How many rows tell which columns change from reading to reading, and how often each is read."""


def identity_of(model: nn.Module, data: Mapping[str, Any], workers: int) -> dict[str, str]:
    """The digests by name; every rank takes part."""
    return {"model": digest_model(model)} | {name: digest_parts(rows, name, workers) for name, rows in data.items()}


def digest_parts(parts: Any, name: str, workers: int = 0) -> str:
    """``digest_data`` of one dataset, or of several by their names; ``ABSENT`` for none."""
    if parts is None:
        return ABSENT
    if not isinstance(parts, dict):
        return digest_data(parts, name, workers)
    found = {str(part): digest_data(rows, f"{name}[{part!r}]", workers) for part, rows in parts.items()}
    return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()


def compared_options(args: Any) -> dict[str, str]:
    """The options that decide which numbers the guard compares, as text."""
    return {name: repr(getattr(args, name)) for name in _COMPARED}


def digest_model(model: nn.Module) -> str:
    """SHA-256 of names, dtypes and values of all that a model's state holds. Every rank takes part."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        held = whole(value.detach()).cpu().contiguous()
        digest.update(f"{name} {held.dtype} {tuple(held.shape)}".encode())
        digest.update(held.reshape(-1).view(torch.uint8).numpy().data if held.numel() else b"")
    return digest.hexdigest()


def digest_data(rows: Any, name: str, workers: int = 0) -> str:
    """SHA-256 of every row of a dataset, in order; a stream has none, it may not be read twice.

    One process of each machine reads every row once, in data workers where there are some. Columns that differ when a
    few rows are read again, as pixels under a random transform, do not count; labels then do.

    Raises:
        DataError: a row that cannot be read.
    """
    if is_stream(rows):
        return "stream"
    if isinstance(rows, PixelDataset):  # whose digests are kept on disk where its images are decoded as they are read
        digest = hashlib.sha256(digest_once(rows, name).encode())
        digest.update(_bytes(rows.labels))
        return digest.hexdigest()
    columns = _steady(rows)

    def read() -> Tensor:
        digest = hashlib.sha256(f"{len(rows)} rows of {columns}".encode())
        draws = torch.Generator()  # looking must not change what is drawn in training
        options: dict[str, Any] = {"batch_size": 64, "num_workers": workers, "generator": draws}
        loader = DataLoader(NamedRows(rows, name), collate_fn=_Digests(columns), **options)
        with tqdm(total=len(rows), desc=f"hash of {name}", unit="row", leave=False, disable=None) as bar:
            for part in loader:
                digest.update(b"".join(part))
                bar.update(len(part))
        return torch.tensor(list(digest.digest()), dtype=torch.uint8)

    return bytes(read_once(read, hashlib.sha256().digest_size).tolist()).hex()


class _Digests:
    """The digest of each row's columns of these names."""

    def __init__(self, columns: Sequence[str]):
        self._columns = columns

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> list[bytes]:
        return [hashlib.sha256(b"|".join(_digest(row.get(name)) for name in self._columns)).digest() for row in rows]


def _steady(rows: Any) -> list[str]:
    """Names of the columns that are the same whenever a row is read, as far as a few rows at equal distances tell."""
    count = len(rows)
    moving: set[str] = set()
    columns: set[str] = set()
    for place in sorted({row * count // _ROWS for row in range(_ROWS)} if count > _ROWS else range(count)):
        first, *others = ({name: _digest(part) for name, part in rows[place].items()} for _ in range(_READINGS))
        columns |= first.keys()
        moving |= {name for name in first if any(other.get(name) != first[name] for other in others)}
    return sorted(columns - moving)


def _digest(value: Any) -> bytes:
    return hashlib.sha256(_bytes(value)).digest()


def _bytes(value: Any) -> bytes:
    if isinstance(value, tuple | list):
        return b"".join(_bytes(part) for part in value)
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, Image):
        return value.tobytes()
    try:
        held = torch.as_tensor(value).detach().cpu().contiguous()
    except (TypeError, ValueError, RuntimeError):
        return repr(type(value)).encode()  # something that a transform left in its row
    return held.reshape(-1).view(torch.uint8).numpy().tobytes() if held.numel() else b""
