"""What a checkpoint belongs to: the model before immunization and the rows, each by a digest."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from hf_immunize.data import is_stream
from hf_immunize.training.core.sharding import whole

_ROWS = 8


def digest_model(model: nn.Module) -> str:
    """SHA-256 of names, dtypes and values of all that a model's state holds. Every rank takes part."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        held = whole(value.detach()).cpu().contiguous()
        digest.update(f"{name} {held.dtype} {tuple(held.shape)}".encode())
        digest.update(held.reshape(-1).view(torch.uint8).numpy().data if held.numel() else b"")
    return digest.hexdigest()


def digest_some(rows: Any) -> str:
    """SHA-256 of the number of rows and of a few rows at equal distances; a stream has none, it may not be read twice.

    Rows that differ when they are read again, as under a random transform, count with their labels alone.
    """
    if is_stream(rows):
        return "stream"
    count = len(rows)
    digest = hashlib.sha256(f"{count} rows".encode())
    for place in sorted({row * count // _ROWS for row in range(_ROWS)} if count > _ROWS else range(count)):
        digest.update(_digest_row(rows, place).encode())
    return digest.hexdigest()


def _digest_row(rows: Any, place: int) -> str:
    first, again = ({name: _bytes(part) for name, part in rows[place].items()} for _ in range(2))
    told = [f"{name}:{hashlib.sha256(part).hexdigest()}" for name, part in sorted(first.items()) if part == again[name]]
    return "|".join(told)


def _bytes(value: Any) -> bytes:
    if isinstance(value, tuple | list):
        return b"".join(_bytes(part) for part in value)
    try:
        held = torch.as_tensor(value).detach().cpu().contiguous()
    except (TypeError, ValueError, RuntimeError):
        return repr(type(value)).encode()  # an image that a transform left in its row
    return held.reshape(-1).view(torch.uint8).numpy().tobytes() if held.numel() else b""
