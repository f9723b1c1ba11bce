"""The paper's formulas, term by term, against matrices and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_immunize.errors import SpectrumError
from hf_immunize.linalg import second_moment_spectrum, spectral_adversary
from hf_immunize.regularizers import (
    alternate_within_classes,
    closed_form_adversary,
    ill_conditioned,
    log_condition,
    well_conditioned,
)


def features(rows: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(phi: torch.Tensor) -> torch.Tensor:
    phi = phi - phi.mean(0)
    return phi.T @ phi / len(phi)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 15), st.integers(1, 10), st.integers(0, 999))
def test_values_equal_the_definitions_on_the_matrix(rows, width, seed):
    phi = features(rows, width, seed)
    matrix, spectrum = moment(phi), second_moment_spectrum(phi)
    sigma = torch.linalg.svdvals(matrix)
    rank = min(rows - 1, width)
    p = width
    assert int(spectrum.rank) == rank
    well = 0.5 * sigma[0] ** 2 - matrix.square().sum() / (2 * p)
    gap = matrix.square().sum() / (2 * rank) - 0.5 * sigma[rank - 1] ** 2
    assert float(well_conditioned(spectrum)) == pytest.approx(float(well), rel=1e-9, abs=1e-12)
    if gap > 1e-9:
        assert float(ill_conditioned(spectrum)) == pytest.approx(float(1 / gap), rel=1e-6)
        kappa = float(sigma[0] / sigma[rank - 1])
        assert 1 / math.log(kappa) <= float(sigma[0] ** 2 * ill_conditioned(spectrum)) * (1 + 1e-9)
    assert float(log_condition(spectrum)) == pytest.approx(math.log(sigma[0] / sigma[rank - 1]), rel=1e-9, abs=1e-9)
    assert float(well_conditioned(spectrum)) >= -1e-12 and float(ill_conditioned(spectrum)) >= 0


@pytest.mark.parametrize("rows,width", [(12, 5), (4, 9)], ids=["N>d", "N<d"])
def test_gradients_equal_the_closed_forms_of_the_paper(rows, width):
    """∇R_well = σ₁u₁v₁ᵀ − S/p and ∇R_ill = (σ_k u_k v_kᵀ − S/k)/Q², chained through S = ΦᵀΦ/N."""
    phi = features(rows, width, 3).requires_grad_()
    centred = (phi - phi.mean(0)).detach()
    matrix = centred.T @ centred / rows
    left, sigma, right = torch.linalg.svd(matrix)
    rank = min(rows - 1, width)
    outer = lambda i: torch.outer(left[:, i], right[i])  # noqa: E731
    gap = matrix.square().sum() / (2 * rank) - 0.5 * sigma[rank - 1] ** 2
    expected = {
        well_conditioned: sigma[0] * outer(0) - matrix / width,
        ill_conditioned: (sigma[rank - 1] * outer(rank - 1) - matrix / rank) / gap**2,
    }
    for regularizer, on_matrix in expected.items():
        (ours,) = torch.autograd.grad(regularizer(second_moment_spectrum(phi)), phi)
        by_hand = 2 * centred @ on_matrix / rows  # columns of `centred` have mean zero, so centring changes nothing
        assert torch.allclose(ours, by_hand, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("regularizer", [well_conditioned, ill_conditioned, log_condition])
@pytest.mark.parametrize("rows,width", [(12, 5), (5, 5), (4, 9)])
def test_gradients_match_finite_differences(regularizer, rows, width):
    phi = features(rows, width, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: regularizer(second_moment_spectrum(z)), phi, rtol=1e-4)


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_extreme_scales_stay_finite(scale):
    phi = (features(20, 6, 0) * scale).requires_grad_()
    plain, scaled = second_moment_spectrum(phi.detach() / scale), second_moment_spectrum(phi)
    assert float(well_conditioned(scaled)) == pytest.approx(float(well_conditioned(plain)) * scale**4, rel=1e-9)
    assert float(ill_conditioned(scaled)) == pytest.approx(float(ill_conditioned(plain)) * scale**-4, rel=1e-9)
    (well_conditioned(scaled) + ill_conditioned(scaled) + log_condition(scaled)).backward()
    assert torch.isfinite(phi.grad).all()


def test_a_perfectly_conditioned_matrix_is_infinitely_far_from_ill_and_pushes_nowhere():
    phi = torch.eye(4, dtype=torch.float64, requires_grad=True)
    value = ill_conditioned(second_moment_spectrum(phi, centered=False))
    value.backward()
    assert float(value) == math.inf
    assert torch.equal(phi.grad, torch.zeros_like(phi))


@pytest.mark.parametrize("seed", range(6))
def test_rounding_does_not_decide_where_a_perfectly_conditioned_matrix_is_pushed(seed):
    """Orthonormal columns: all eigenvalues equal 1/N up to rounding; it gave 4.6e18 with a gradient of 2.5e34."""
    phi = torch.linalg.qr(torch.randn(40, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]
    phi.requires_grad_()
    value = ill_conditioned(second_moment_spectrum(phi, centered=False))
    value.backward()
    assert float(value) == math.inf and torch.equal(phi.grad, torch.zeros_like(phi))
    barely = phi.detach() * torch.linspace(1, 1 + 1e-9, 8, dtype=torch.float64)
    found = float(ill_conditioned(second_moment_spectrum(barely, centered=False)))
    sigma = torch.linspace(1, 1 + 1e-9, 8, dtype=torch.float64).square() / 40
    assert found == pytest.approx(1 / float(sigma.square().mean() / 2 - sigma[0].square() / 2), rel=1e-4)


def test_descending_each_term_moves_kappa_its_way():
    for regularizer, rises in ((well_conditioned, False), (ill_conditioned, True)):
        phi = features(30, 4, 5).requires_grad_()
        before = second_moment_spectrum(phi)
        (gradient,) = torch.autograd.grad(regularizer(before), phi)
        after = second_moment_spectrum(phi.detach() - 1e-3 * gradient / gradient.norm())
        assert (float(after.log_condition) > float(before.log_condition)) is rises


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=4, max_size=30))
def test_the_two_halves_hold_the_same_classes_and_share_no_row(labels):
    labels = torch.tensor(labels)
    usable = sum(int((labels == label).sum()) >= 2 for label in labels.unique())
    if usable < 2:
        with pytest.raises(SpectrumError, match="at least two classes with two rows each"):
            alternate_within_classes(labels)
        return
    support, query = alternate_within_classes(labels)
    assert not set(support.tolist()) & set(query.tolist())
    assert torch.equal(labels[support].sort().values, labels[query].sort().values)
    assert len(support) == sum(int((labels == label).sum()) // 2 for label in labels.unique())


def test_the_adversary_is_the_mean_of_both_roles_and_never_negative():
    phi, labels = features(12, 5, 0), torch.arange(12) % 3
    support, query = alternate_within_classes(labels)
    targets = torch.nn.functional.one_hot(labels, 3)
    pairs = ((support, query), (query, support))
    parts = [spectral_adversary(phi[a], targets[a], phi[b], targets[b], 1e3) for a, b in pairs]
    expected = sum(max(float(held), 0) + 0.5 * max(float(seen), 0) for held, seen in parts) / 2
    ours = closed_form_adversary(phi, labels, horizon=1e3, memorization=0.5)
    assert float(ours) == pytest.approx(expected, rel=1e-9)
    assert float(closed_form_adversary(phi, labels, horizon=1e9)) >= 0


def test_the_adversary_reads_planted_information_and_descending_it_removes_it():
    labels = torch.arange(60) % 3
    planted = torch.nn.functional.one_hot(labels, 3).double() + 0.1 * features(60, 3, 1)
    phi = torch.cat([planted, features(60, 5, 2)], dim=1).requires_grad_()
    first = closed_form_adversary(phi, labels, horizon=100.0)
    assert float(first) > 0.8
    for _ in range(200):
        (gradient,) = torch.autograd.grad(closed_form_adversary(phi, labels, horizon=100.0), phi)
        phi = (phi - 2.0 * gradient).detach().requires_grad_()
    assert float(closed_form_adversary(phi, labels, horizon=100.0)) < 0.3 * float(first)
