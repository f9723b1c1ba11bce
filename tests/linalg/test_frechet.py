"""Fréchet distance against a matrix square root, and what it must not depend on."""

from __future__ import annotations

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_immunize.errors import SpectrumError
from hf_immunize.linalg import frechet_distance


def rows(count: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) @ mixing + seed % 3


def by_square_root(first: torch.Tensor, second: torch.Tensor) -> float:
    """The definition, with scipy's square root of Σ₁Σ₂."""
    covariances = [torch.atleast_2d(torch.cov(part.mT)) for part in (first, second)]
    root = torch.as_tensor(scipy.linalg.sqrtm((covariances[0] @ covariances[1]).numpy()).real)
    gap = (first.mean(0) - second.mean(0)).square().sum()
    return float(gap + torch.trace(covariances[0] + covariances[1] - 2 * root))


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(12, 40), other=st.integers(12, 40), width=st.integers(1, 8), seed=st.integers(0, 10**6)
)
def test_it_is_the_definition(count, other, width, seed):
    first, second = rows(count, width, seed), rows(other, width, seed + 1)
    assert frechet_distance(first, second) == pytest.approx(by_square_root(first, second), rel=1e-7, abs=1e-7)


@settings(max_examples=25, deadline=None)
@given(count=st.integers(2, 9), width=st.integers(3, 30), seed=st.integers(0, 10**6))
def test_fewer_rows_than_features_symmetry_shift_and_rotation(count, width, seed):
    first, second = rows(count, width, seed), rows(count + 3, width, seed + 1)
    found = frechet_distance(first, second)
    scale = float(first.square().sum() + second.square().sum())
    assert found >= 0
    assert frechet_distance(second, first) == pytest.approx(found, rel=1e-9, abs=1e-9 * scale)
    turn = torch.linalg.qr(rows(width, width, seed + 2)).Q
    assert frechet_distance(first @ turn, second @ turn) == pytest.approx(found, rel=1e-8, abs=1e-9 * scale)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9 * scale)
    assert frechet_distance(first, first + 2) == pytest.approx(4 * width, rel=1e-8, abs=1e-9 * scale)


def test_two_gaussians_on_a_line():
    first, second = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [7.0]])
    assert frechet_distance(first, second) == pytest.approx(3**2 + (2**0.5 - 18**0.5) ** 2)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (torch.randn(1, 3), torch.randn(5, 3), "at least 2 rows"),
        (torch.randn(5, 3), torch.randn(5, 4), "one width"),
        (torch.full((5, 3), float("nan")), torch.randn(5, 3), "finite"),
    ],
)
def test_bad_input(first, second, message):
    with pytest.raises(SpectrumError, match=message):
        frechet_distance(first, second)
