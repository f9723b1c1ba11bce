"""κ, rank and gradients against matrices whose answer was built, and against slow independent truths."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_immunize.errors import SpectrumError
from hf_immunize.linalg import SpectrumStatus, second_moment_spectrum


def with_singular_values(rows: int, width: int, sigma: torch.Tensor, seed: int = 0, mean_free: bool = False):
    """A rows×width float64 matrix with exactly these singular values (up to 1e-15), optionally of zero column mean."""
    generator = torch.Generator().manual_seed(seed)
    count = len(sigma)
    left = torch.randn(rows, count, generator=generator, dtype=torch.float64)
    if mean_free:
        left = left - left.mean(dim=0)
    left = torch.linalg.qr(left).Q
    right = torch.linalg.qr(torch.randn(width, count, generator=generator, dtype=torch.float64)).Q
    return left @ torch.diag(sigma) @ right.T


shapes = st.tuples(st.integers(2, 24), st.integers(1, 24), st.integers(1, 8))


@settings(max_examples=60, deadline=None)
@given(shapes, st.floats(0, 5), st.floats(-8, 8), st.integers(0, 1000), st.sampled_from(["svd", "gram"]))
def test_condition_number_is_the_one_we_built(shape, log_kappa, log_scale, seed, method):
    rows, width, rank = shape
    rank = min(rank, rows, width)
    sigma = torch.logspace(0, -log_kappa if rank > 1 else 0, rank, dtype=torch.float64) * 10**log_scale
    features = with_singular_values(rows, width, sigma, seed)
    spectrum = second_moment_spectrum(features, centered=False, method=method)
    kappa = float(sigma[0] / sigma[-1])
    # Forming the Gram matrix costs eps * kappa^2 relative accuracy; the SVD costs eps * kappa.
    tolerance = 1e-10 + (1e-14 * kappa if method == "svd" else 1e-14 * kappa**2)
    if method == "gram" and kappa > 1e5:
        return
    assert int(spectrum.rank) == rank
    assert spectrum.condition_number == pytest.approx(kappa**2, rel=tolerance)
    assert spectrum.status is (SpectrumStatus.OK if rank == width else SpectrumStatus.RANK_DEFICIENT)
    assert float(spectrum.frobenius_squared) == pytest.approx(float((sigma**4).sum()) / rows**2, rel=1e-8)


@settings(max_examples=40, deadline=None)
@given(shapes, st.floats(0, 3), st.integers(0, 1000))
def test_centred_spectrum_ignores_an_added_mean(shape, log_kappa, seed):
    rows, width, rank = shape
    rank = min(rank, rows - 1, width)
    if rank < 1:
        return
    sigma = torch.logspace(0, -log_kappa if rank > 1 else 0, rank, dtype=torch.float64)
    features = with_singular_values(rows, width, sigma, seed, mean_free=True)
    offset = torch.randn(width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 10
    spectrum = second_moment_spectrum(features + offset)
    assert int(spectrum.rank) == rank
    assert spectrum.condition_number == pytest.approx(float(sigma[0] / sigma[-1]) ** 2, rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(shapes, st.floats(-8, 8), st.integers(0, 1000))
def test_float32_features_keep_three_digits_and_the_rank(shape, log_scale, seed):
    rows, width, rank = shape
    rank = min(rank, rows, width)
    sigma = torch.logspace(0, -2 if rank > 1 else 0, rank, dtype=torch.float64)
    features = (with_singular_values(rows, width, sigma, seed) * 10**log_scale).float()
    spectrum = second_moment_spectrum(features, centered=False)
    assert spectrum.largest.dtype == torch.float64
    assert int(spectrum.rank) == rank
    assert spectrum.condition_number == pytest.approx(float(sigma[0] / sigma[-1]) ** 2, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows,width", [(40, 8), (8, 40), (16, 16)])
def test_half_precision_noise_is_not_rank(dtype, rows, width):
    sigma = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)
    features = (with_singular_values(rows, width, sigma) * 8).to(dtype)
    spectrum = second_moment_spectrum(features, centered=False)
    assert int(spectrum.rank) == 3  # a float32 floor would count the storage rounding as five and more directions
    assert spectrum.condition_number == pytest.approx(16.0, rel=0.1)


def test_rank_deficient_float32_features_do_not_report_rounding_noise():
    sigma = torch.tensor([1.0, 0.1], dtype=torch.float64)
    features = with_singular_values(50, 20, sigma).float()
    naive = np.linalg.svd(features.double().numpy(), compute_uv=False)
    assert (naive[0] / naive[-1]) ** 2 > 1e10  # what a full-spectrum condition number would say
    assert second_moment_spectrum(features, centered=False).condition_number == pytest.approx(100, rel=1e-4)


@pytest.mark.parametrize(
    "features,status",
    [
        (torch.zeros(5, 3), SpectrumStatus.ZERO),
        (torch.full((5, 3), 1.1), SpectrumStatus.ZERO),
        (torch.full((5, 3), 0.1, dtype=torch.float64), SpectrumStatus.ZERO),
        (torch.ones(1, 3), SpectrumStatus.ZERO),
        (torch.full((4, 3), float("nan")), SpectrumStatus.NOT_FINITE),
        (torch.tensor([[1.0, float("inf")], [0.0, 1.0]]), SpectrumStatus.NOT_FINITE),
    ],
    ids=["zero", "constant", "constant64", "one row", "nan", "inf"],
)
def test_undefined_spectra_have_a_status_and_raise_when_asked_for_a_number(features, status):
    spectrum = second_moment_spectrum(features)
    assert spectrum.status is status
    assert math.isnan(float(spectrum.log_condition)) or not math.isfinite(float(spectrum.log_condition))
    with pytest.raises(SpectrumError, match=f"status {status.value}"):
        _ = spectrum.condition_number


def test_one_row_uncentred_has_rank_one():
    spectrum = second_moment_spectrum(torch.tensor([[3.0, 4.0]]), centered=False)
    assert (int(spectrum.rank), spectrum.condition_number) == (1, 1.0)
    assert float(spectrum.largest) == pytest.approx(25.0)


@pytest.mark.parametrize("constant", [0.0, 1e4])
def test_constant_columns_add_no_rank(constant):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    padded = torch.cat([features, torch.full((30, 2), constant, dtype=torch.float64)], dim=1)
    assert int(second_moment_spectrum(padded).rank) == 4
    assert second_moment_spectrum(padded).condition_number == pytest.approx(
        second_moment_spectrum(features).condition_number, rel=1e-9
    )


@pytest.mark.parametrize("method", ["svd", "gram"])
@pytest.mark.parametrize("rows,width", [(9, 5), (5, 5), (5, 9)], ids=["N>d", "N=d", "N<d"])
@pytest.mark.parametrize("quantity", ["largest", "smallest", "frobenius_squared", "log_condition"])
def test_gradients_match_finite_differences(method, rows, width, quantity):
    generator = torch.Generator().manual_seed(rows * width)
    features = torch.randn(rows, width, generator=generator, dtype=torch.float64, requires_grad=True)
    measure = lambda phi: getattr(second_moment_spectrum(phi, method=method), quantity)  # noqa: E731
    assert torch.autograd.gradcheck(measure, features, eps=1e-6, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("method", ["svd", "gram"])
@pytest.mark.parametrize("rows,width", [(6, 3), (3, 6), (4, 4)])
def test_gradients_stay_finite_at_repeated_eigenvalues(method, rows, width):
    features = torch.eye(rows, width, dtype=torch.float64, requires_grad=True)
    spectrum = second_moment_spectrum(features, centered=False, method=method)
    (spectrum.log_condition + spectrum.frobenius_squared).backward()
    assert torch.isfinite(features.grad).all()
    assert features.grad.abs().sum() > 0


def test_the_graph_holds_no_square_of_the_wide_side():
    features = torch.randn(8, 3000, requires_grad=True)
    spectrum = second_moment_spectrum(features)
    saved = [t for t in spectrum.largest.grad_fn.saved_tensors if t is not None]
    assert max(tensor.numel() for tensor in saved) <= 8 * 3000


@pytest.mark.parametrize("bad", [torch.ones(3), torch.ones(0, 4), torch.ones(4, 0), torch.ones(2, 3, dtype=torch.long)])
def test_what_is_no_feature_matrix_is_refused(bad):
    with pytest.raises(SpectrumError, match="expected a floating-point N x D matrix"):
        second_moment_spectrum(bad)


def test_an_unknown_method_is_refused():
    with pytest.raises(SpectrumError, match="'auto', 'svd' or 'gram'"):
        second_moment_spectrum(torch.ones(2, 2), method="power")


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["svd", "gram"])
def test_cuda_agrees_with_the_cpu(method):
    features = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
    here, there = features.clone().requires_grad_(), features.cuda().requires_grad_()
    for each in (here, there):
        second_moment_spectrum(each, method=method).log_condition.backward()
    assert torch.allclose(here.grad, there.grad.cpu(), rtol=1e-4, atol=1e-6)


def test_effective_rank_of_a_flat_and_of_a_lone_eigenvalue():
    flat = second_moment_spectrum(torch.eye(4, dtype=torch.float64), centered=False)
    lone = second_moment_spectrum(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), centered=False)
    assert float(flat.effective_rank) == pytest.approx(4)
    assert float(lone.effective_rank) == pytest.approx(1)
