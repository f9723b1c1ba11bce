import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_immunize.errors import SpectrumError
from hf_immunize.linalg.factor import factor_features, factor_moment, feature_singular_values


def rows_with_spectrum(sigma, rows=12, seed=0):
    generator = np.random.default_rng(seed)
    width = len(sigma)
    left = scipy.linalg.qr(generator.normal(size=(rows, width)), mode="economic")[0]
    right = scipy.linalg.qr(generator.normal(size=(width, width)))[0]
    return torch.from_numpy(left * np.asarray(sigma) @ right.T)


@pytest.mark.parametrize("kappa", [1.0, 1e3, 1e6, 1e12], ids="kappa={:g}".format)
def test_condition_number_of_rows_is_the_one_we_built(kappa):
    root = math.sqrt(kappa)
    assert factor_features(rows_with_spectrum([root, 1.0, 1.0])).condition_number == pytest.approx(kappa, rel=1e-7)


def test_rank_range_and_null_space_of_a_deficient_matrix():
    rows = rows_with_spectrum([5.0, 2.0, 0.0, 0.0])
    factor = factor_features(rows)
    assert factor.rank == 2 and factor.width == 4
    assert factor.dropped < 1e-15 < factor.tolerance
    assert float((rows @ factor.null_DZ).abs().max()) < 1e-12
    torch.testing.assert_close(factor.moment_DD, rows.T @ rows)


def test_rows_and_moment_agree():
    rows = rows_with_spectrum([3.0, 1.0, 0.5])
    a, b = factor_features(rows), factor_moment(rows.T @ rows)
    torch.testing.assert_close(a.sigma_R, b.sigma_R)
    torch.testing.assert_close(a.right_DR.abs(), b.right_DR.abs())


def test_moment_cannot_see_what_rows_can():
    rows = rows_with_spectrum([1e6, 1.0, 1e-2])
    assert factor_features(rows).rank == 3
    assert factor_moment(rows.T @ rows).rank == 2  # (1e-8)^2 is below the rounding of a Gram matrix


def test_tolerance_follows_the_dtype_of_the_features():
    rows = rows_with_spectrum([1.0, 1.0, 1e-8])
    assert factor_features(rows).rank == 3
    assert factor_features(rows, feature_dtype=torch.float32).rank == 2
    assert factor_features(rows.float()).rank == 2
    assert factor_features(rows, tolerance=0.5).tolerance == 0.5


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 9), width=st.integers(1, 9), seed=st.integers(0, 10_000), exponent=st.floats(-150, 150)
)
def test_values_and_factor_decide_alike_at_any_scale(rows, width, seed, exponent):
    matrix = torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, width))) * 10.0**exponent
    factor = factor_features(matrix)
    sigma, tolerance = feature_singular_values(matrix)
    assert factor.rank == min(rows, width) == int((sigma > tolerance * sigma[0]).sum())
    truth = np.linalg.svd(matrix.numpy(), compute_uv=False)
    np.testing.assert_allclose(factor.sigma_R.numpy(), truth, rtol=1e-9)
    assert factor.right_DR.shape == (width, factor.rank) and factor.null_DZ.shape == (width, width - factor.rank)


def test_through_never_forms_the_gram_matrix():
    rows = rows_with_spectrum([1e7, 1.0])
    theta = torch.tensor([[1.0, 0.0], [2.0, 3.0]], dtype=torch.float64)
    truth = np.linalg.svd((rows @ theta).numpy(), compute_uv=False)
    assert factor_features(rows).through(theta).condition_number == pytest.approx((truth[0] / truth[1]) ** 2, rel=1e-6)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.zeros(3, 3), "zero matrix"),
        (torch.full((3, 3), float("nan")), "finite"),
        (torch.ones(2, 3), "square"),
        (torch.tensor([[1.0, 2.0], [0.0, 1.0]]), "symmetric"),
        (torch.diag(torch.tensor([1.0, -1.0])), "positive semidefinite"),
        (-torch.eye(2), "positive semidefinite"),
        (torch.ones(3), "N x D matrix"),
        (torch.ones(2, 2, dtype=torch.long), "floating-point"),
    ],
    ids=["zero", "nan", "wide", "skew", "indefinite", "negative", "vector", "integer"],
)
def test_bad_moments_are_refused(matrix, message):
    with pytest.raises(SpectrumError, match=message):
        factor_moment(matrix)


def test_bad_rows_tolerances_and_extractors_are_refused():
    with pytest.raises(SpectrumError, match="zero matrix"):
        factor_features(torch.zeros(4, 2))
    with pytest.raises(SpectrumError, match="finite"):
        factor_features(torch.tensor([[float("inf")]]))
    with pytest.raises(SpectrumError, match=r"tolerance in \[0, 1\)"):
        factor_features(torch.ones(2, 2), tolerance=1.0)
    with pytest.raises(SpectrumError, match="2 input rows"):
        factor_features(torch.eye(2)).through(torch.eye(3))
