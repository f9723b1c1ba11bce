"""Draws that come from words alone: whatever ran before, whoever draws."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch


def generator_of(*words: object) -> torch.Generator:
    """A CPU generator seeded with the SHA-256 of ``words``."""
    digest = hashlib.sha256(repr(words).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@contextlib.contextmanager
def same_draws(device: torch.device, *words: object) -> Iterator[None]:
    """Draws inside come from ``words`` alone; the global generators are left as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(generator_of(*words).initial_seed())
        yield
