"""Formulas against autograd, and what a step of each does to κ over thousands of draws (Zheng et al. 2025)."""

import pytest
import torch
from linear_builders import gaussian, spread_rows

from hf_immunize.linalg import second_moment_spectrum
from hf_immunize.linalg.factor import factor_features
from hf_immunize.linear.directions import (
    Through,
    ill_direction,
    log_condition_direction,
    safe_ill_step,
    safe_well_step,
    well_direction,
)
from hf_immunize.regularizers import ill_conditioned, log_condition, well_conditioned

DRAWS = 1000


def through(rows, theta):
    factor = factor_features(rows)
    return Through.of(factor.factor_RD, factor.right_DR.T, theta)


def autograd(rows, theta, regularizer):
    """∇_θ of a regularizer of XᵀX (the Spectrum is of XᵀX/N: scale the rows by √N)."""
    theta = theta.clone().requires_grad_(True)
    scaled = rows * rows.shape[0] ** 0.5
    regularizer(second_moment_spectrum(scaled @ theta, centered=False)).backward()
    return theta.grad


@pytest.mark.parametrize("rows_count", [30, 3], ids=["full rank", "rank 3 of 5"])
def test_directions_are_the_gradients_of_the_regularizers(rows_count):
    rows, theta = spread_rows(1, rows_count, 5, 0.5), gaussian(2, 5, 5)
    at = through(rows, theta)
    pairs = [
        (well_direction(at, width=5, preconditioned=False), well_conditioned),
        (ill_direction(at, preconditioned=False), ill_conditioned),
        (log_condition_direction(at), log_condition),
    ]
    for direction, regularizer in pairs:
        torch.testing.assert_close(direction, autograd(rows, theta, regularizer), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("rows_count", [30, 3], ids=["full rank", "rank 3 of 5"])
def test_preconditioned_directions_have_the_pseudo_inverse_in_front(rows_count):
    rows, theta = spread_rows(1, rows_count, 5, 0.5), gaussian(2, 5, 5)
    at, inverse = through(rows, theta), torch.linalg.pinv(rows.T @ rows, rtol=1e-10)
    for plain, direction in (
        (well_direction(at, width=5, preconditioned=False), well_direction(at, width=5)),
        (ill_direction(at, preconditioned=False), ill_direction(at)),
    ):
        torch.testing.assert_close(direction, inverse @ plain, rtol=1e-7, atol=1e-9)


def test_ill_direction_is_zero_where_the_task_is_perfectly_conditioned():
    at = through(torch.eye(4).double(), torch.eye(4).double())
    assert torch.equal(ill_direction(at), torch.zeros(4, 4).double())


@pytest.mark.parametrize("seed", range(4))
def test_rounding_gives_a_perfectly_conditioned_task_no_direction(seed):
    """Eigenvalues of a rotation are equal up to rounding; divided by Q² that was a step of 4e30."""
    rows = torch.linalg.qr(gaussian(seed, 8, 8))[0]
    assert torch.equal(ill_direction(through(rows, torch.eye(8).double())), torch.zeros(8, 8).double())
    barely = torch.diag(torch.linspace(1, 1 + 1e-9, 8, dtype=torch.float64)) @ rows
    assert float(ill_direction(through(barely, torch.eye(8).double())).abs().max()) > 1e10


def test_cluster_shares_the_step_of_nearly_equal_eigenvalues():
    rows = torch.diag(torch.tensor([2.0, 2.0 - 1e-9, 1.0], dtype=torch.float64))
    at = through(rows, torch.eye(3).double())
    moved = through(rows, torch.eye(3).double() - 0.01 * well_direction(at, width=3, cluster=0.1)).values_R
    assert float(moved[0] - moved[1]) == pytest.approx(0, abs=1e-7)
    assert float(moved[0] / moved[-1]) < 4
    # v₁ alone: one of the pair falls, the other becomes the largest and rises
    alone = through(rows, torch.eye(3).double() - 0.01 * well_direction(at, width=3)).values_R
    assert float(alone[0] / alone[-1]) > 4


def draws():
    """(rows of K, θ) over sizes, scales and seeds."""
    for seed in range(DRAWS):
        width = 2 + seed % 6
        yield spread_rows(3 * seed, width + 4, width, 0.5), gaussian(7 * seed + 1, width, width)


def wrong_sided(direction, rows):
    """What the public reference code does with θ = weightᵀ: K⁻¹ on the output side."""
    moment = rows.T @ rows
    return (moment @ direction) @ torch.linalg.inv(moment)


def kappa(rows, theta):
    sigma = torch.linalg.svdvals(rows @ theta)
    return float((sigma[0] / sigma[-1]).square())


@pytest.mark.parametrize("part", [0.01, 1.0], ids=["small step", "the bound itself"])
def test_safe_well_steps_lower_kappa_in_every_draw(part):
    risen = wrong_risen = 0
    for rows, theta in draws():
        at = through(rows, theta)
        direction, before = well_direction(at, width=theta.shape[1]), kappa(rows, theta)
        step = part * safe_well_step(at.values_R, theta.shape[1])
        risen += kappa(rows, theta - step * direction) > before * (1 + 1e-9)
        other = wrong_sided(direction, rows)
        other = other * (direction.norm() / other.norm())
        wrong_risen += kappa(rows, theta - step * other) > before * (1 + 1e-9)
    assert risen == 0
    assert wrong_risen > 0.1 * DRAWS  # the wrong-sided step of equal length does not have the property


@pytest.mark.parametrize(
    ("part", "wrong"), [(1e-4, 0.1), (0.9, 0.0)], ids=["small step", "nearly the bound, which shrinks σ_k anyhow"]
)
def test_safe_ill_steps_raise_kappa_in_every_draw(part, wrong):
    fallen = wrong_fallen = 0
    for rows, theta in draws():
        at = through(rows, theta)
        direction, before = ill_direction(at), kappa(rows, theta)
        step = part * safe_ill_step(at.values_R)
        fallen += kappa(rows, theta - step * direction) < before * (1 - 1e-9)
        other = wrong_sided(direction, rows)
        other = other * (direction.norm() / other.norm())
        wrong_fallen += kappa(rows, theta - step * other) < before * (1 - 1e-9)
    assert fallen == 0
    assert wrong_fallen >= wrong * DRAWS
