"""Running out of memory as an error that names the options which need less."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from hf_immunize.errors import DeviceMemoryError

_ON_THE_CPU = "can't allocate memory"
"""What PyTorch's CPU allocator says, in a plain RuntimeError."""


@contextlib.contextmanager
def fits_memory(what: str, remedy: str) -> Iterator[None]:
    """Raise DeviceMemoryError when ``what`` does not fit: ``remedy`` says which options to change."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise DeviceMemoryError(f"expected {what} to fit the memory, got {error}: {remedy}.") from error
    except RuntimeError as error:
        if _ON_THE_CPU not in str(error):
            raise
        raise DeviceMemoryError(f"expected {what} to fit the memory, got {error}: {remedy}.") from error
