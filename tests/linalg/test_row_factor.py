"""The triangular factor against numpy's SVD of the centred rows, however the rows are cut."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_immunize.errors import SpectrumError
from hf_immunize.linalg import RowFactor, SpectrumStatus, second_moment_spectrum, spectral_steps
from hf_immunize.spectra import spectrum_record


def drawn(rows: int, width: int, seed: int, log_kappa: float = 1.0, offset: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return noise * torch.logspace(0, -log_kappa, width, dtype=torch.float64) + offset


def factor_of(features: torch.Tensor, targets: torch.Tensor | None = None, *cuts: int) -> RowFactor:
    factor = RowFactor()
    bounds = [0, *sorted({min(cut, len(features)) for cut in cuts} - {0, len(features)}), len(features)]
    for first, last in zip(bounds, bounds[1:], strict=False):
        factor.add(features[first:last], None if targets is None else targets[first:last])
    return factor


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 90), st.integers(1, 12), st.lists(st.integers(1, 89), max_size=3), st.integers(0, 999))
def test_spectrum_is_that_of_numpy_whatever_the_blocks(rows, width, cuts, seed):
    features = drawn(rows, width, seed, offset=3.0)
    found = factor_of(features, None, *cuts).spectrum()
    centred = (features - features.mean(0)).numpy()
    truth = np.linalg.svd(centred, compute_uv=False) ** 2 / rows
    assert (found.rows, found.width, len(found.eigenvalues)) == (rows, width, min(rows, width))
    assert np.allclose(found.eigenvalues.numpy(), truth, rtol=1e-9, atol=1e-12 * max(truth.max(), 1e-3))
    whole = second_moment_spectrum(features, method="svd")
    assert int(found.rank) == int(whole.rank) == min(rows - 1, width)
    assert found.status is whole.status
    if rows > 1:
        assert float(found.smallest) == pytest.approx(float(truth[int(found.rank) - 1]), rel=1e-8)
        assert float(found.frobenius_squared) == pytest.approx(float((truth**2).sum()), rel=1e-9)


@pytest.mark.parametrize("rows,width", [(300, 8), (40, 20), (12, 30)])
def test_spectral_steps_solve_their_equation_on_numpys_svd(rows, width):
    features = drawn(rows, width, 0, offset=2.0)
    targets = torch.nn.functional.one_hot((features[:, 0] > 2).long() + 2 * (features[:, 1] > 2.0).long(), 4).double()
    found = factor_of(features, targets, 5, 7, 100).spectral_steps(0.6)
    assert found == pytest.approx(spectral_steps(features, targets, 0.6), rel=1e-6)
    left, sigma, _ = np.linalg.svd((features - features.mean(0)).numpy(), full_matrices=False)
    kept = sigma > 1e-10 * sigma[0]
    left, sigma = left[:, kept], sigma[kept]
    centred = (targets - targets.mean(0)).numpy()
    residual = centred - left @ ((1 - (1 - (sigma / sigma[0]) ** 2) ** found)[:, None] * (left.T @ centred))
    assert (residual**2).sum() == pytest.approx(0.6 * (centred**2).sum(), rel=1e-6)


@pytest.mark.parametrize("log_kappa", [3.0, 6.0])
def test_an_ill_conditioned_spectrum_keeps_its_digits(log_kappa):
    """Of K = ΦᵀΦ nothing below 1e-8 of the largest singular value would be left."""
    left = torch.linalg.qr(drawn(400, 6, 1) - drawn(400, 6, 1).mean(0)).Q
    left = torch.linalg.qr(left - left.mean(0)).Q
    sigma = torch.logspace(0, -log_kappa, 6, dtype=torch.float64)
    found = factor_of(left * sigma, None, 50, 51, 300).spectrum()
    assert int(found.rank) == 6
    assert float(found.largest / found.smallest) == pytest.approx(10 ** (2 * log_kappa), rel=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rank_is_that_of_the_dtype_the_rows_came_in(dtype):
    features = (drawn(64, 3, 2) @ drawn(3, 10, 3)).to(dtype)
    assert int(factor_of(features, None, 20).spectrum().rank) == 3
    assert int(factor_of(features.double()).spectrum().rank) == 10


@pytest.mark.parametrize(
    "features,status",
    [
        (torch.full((9, 3), 0.1), SpectrumStatus.ZERO),
        (torch.full((9, 3), 0.1, dtype=torch.float64), SpectrumStatus.ZERO),
        (torch.ones(1, 3), SpectrumStatus.ZERO),
        (torch.tensor([[1.0, float("nan")], [0.0, 1.0], [2.0, 1.0]]), SpectrumStatus.NOT_FINITE),
        (torch.tensor([[1.0, float("inf")], [0.0, 1.0], [2.0, 1.0]]), SpectrumStatus.NOT_FINITE),
    ],
    ids=["constant", "constant64", "one row", "nan", "inf"],
)
def test_what_has_no_spectrum_has_a_status_and_a_record(features, status):
    spectrum = factor_of(features).spectrum()
    assert spectrum.status is status is second_moment_spectrum(features).status
    assert not math.isfinite(float(spectrum.log_condition))
    record = spectrum_record(features, torch.arange(len(features)) % 2, site="head", task="harmful")
    assert (record.status, record.condition_number, record.spectral_steps) == (status.value, None, None)
    assert len(record.eigenvalues) == (0 if status is SpectrumStatus.NOT_FINITE else min(features.shape))


def test_other_widths_empty_data_and_constant_labels_are_refused():
    factor = factor_of(torch.randn(4, 3))
    for wrong in (torch.randn(4, 2), torch.randn(4, 3).double()):
        with pytest.raises(SpectrumError, match="one factor is of one layer"):
            factor.add(wrong)
    with pytest.raises(SpectrumError, match="the dataset is empty"):
        RowFactor().spectrum()
    with pytest.raises(SpectrumError, match="constant labels"):
        spectral_steps(torch.randn(50, 3), torch.full((50, 1), 0.1), 0.2)


def test_no_more_than_a_block_of_rows_is_held():
    factor = RowFactor()
    for _ in range(50):
        factor.add(torch.randn(16, 4), torch.ones(16, 2))
        assert sum(map(len, factor._waiting)) < 4 * 7
        assert factor._triangle is None or factor._triangle.shape[0] <= 7
