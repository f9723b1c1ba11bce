"""Attackers' means at work: what a device can do, the context of a training forward, and exact products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hf_immunize.errors import ConfigError
from hf_immunize.exam.means import Means


def check_means(means: Means, device: str) -> None:
    """Raise ConfigError where a device cannot do what is asked."""
    cuda = torch.device(device).type == "cuda"
    if means.precision == "tf32" and not (cuda and torch.cuda.get_device_capability(device)[0] >= 8):
        raise ConfigError(f"expected a CUDA device of Ampere or newer for precision tf32, got {device}: use float32.")
    if means.precision == "bf16" and cuda and not torch.cuda.is_bf16_supported():
        raise ConfigError(f"expected a device that knows bfloat16 for precision bf16, got {device}: use float32.")


def autocast_of(means: Means, device: str) -> Any:
    """The context of a training forward."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=means.precision == "bf16")


@contextmanager
def products(precision: str) -> Iterator[None]:
    """Products of matrices and convolutions in exact float32, or in tf32; torch's default is tf32 for convolutions."""
    parts = [torch.backends.cuda.matmul, getattr(torch.backends.cudnn, "conv", torch.backends.cudnn)]
    wanted: Any = "tf32" if precision == "tf32" else "ieee"
    name = "fp32_precision"
    if not all(hasattr(part, name) for part in parts):  # torch before 2.9
        parts, name, wanted = [torch.backends.cuda.matmul, torch.backends.cudnn], "allow_tf32", precision == "tf32"
    before = [getattr(part, name) for part in parts]
    for part in parts:
        setattr(part, name, wanted)
    try:
        yield
    finally:
        for part, value in zip(parts, before, strict=True):
            setattr(part, name, value)
