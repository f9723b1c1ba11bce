"""Random tasks of known conditioning and known ranges, and where the shared data may be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch


def gaussian(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def spread_rows(seed: int, rows: int, width: int, decades: float) -> torch.Tensor:
    """Gaussian rows whose columns differ in scale by 10**decades, in a random basis."""
    rotation = torch.linalg.qr(gaussian(seed + 1, width, width))[0]
    return gaussian(seed, rows, width) * torch.logspace(0, decades, width, dtype=torch.float64) @ rotation


def block_pair(sizes: list[int], seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(primary rows, harmful rows, μ): known numbers of common, primary-only, harmful-only and unseen directions."""
    common, own_p, own_h, neither = sizes
    width = sum(sizes)
    basis = gaussian(seed, width, width) + 2 * torch.eye(width, dtype=torch.float64)
    mu = torch.from_numpy(np.sort(np.random.default_rng(seed + 1).uniform(0.1, 10, common))[::-1].copy())
    seen_p = torch.tensor([1.0] * (common + own_p) + [0.0] * (own_h + neither)).double()
    seen_h = torch.cat([mu, torch.tensor([0.0] * own_p + [1.0] * own_h + [0.0] * neither).double()])
    # rows X with XᵀX = B⁻ᵀ diag(d) B⁻¹, so that B block-diagonalizes both
    inverse = torch.linalg.inv(basis)
    return seen_p.sqrt()[:, None] * inverse, seen_h.sqrt()[:, None] * inverse, mu


def shared_folder(name: str) -> Path:
    """A folder of ../shared, or a skip that says what is missing."""
    path = Path(__file__).resolve().parents[2] / "shared" / name
    if not path.exists():
        pytest.skip(f"needs ../shared/{name} beside the repository")
    return path
