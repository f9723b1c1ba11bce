"""The limit theorem: never exceeded, always attained, and the diagnostics that go with it."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_builders import block_pair, gaussian, spread_rows

from hf_immunize.errors import ConfigError, SpectrumError
from hf_immunize.linalg.factor import factor_features
from hf_immunize.linear import (
    LinearImmunizer,
    common_range_conditions,
    covariance_angles,
    eigenvector_overlaps,
    immunization_limit,
)


def kappa(rows):
    sigma = torch.linalg.svdvals(rows)
    return float((sigma[0] / sigma[-1]).square())


@settings(max_examples=150, deadline=None)
@given(width=st.integers(1, 7), seed=st.integers(0, 100_000), decades=st.floats(0, 2))
def test_no_extractor_exceeds_the_limit_and_the_closed_form_attains_it(width, seed, decades):
    primary, harmful = spread_rows(seed, width + 3, width, decades), spread_rows(seed + 9, width + 3, width, decades)
    immunizer = LinearImmunizer(primary, harmful)
    truth = scipy.linalg.eigh((harmful.T @ harmful).numpy(), (primary.T @ primary).numpy(), eigvals_only=True)
    star = truth[-1] / truth[0]
    assert immunizer.limit.condition_limit == pytest.approx(star, rel=1e-6)
    assert immunizer.limit.ratio_limit == pytest.approx(star * kappa(primary) / kappa(harmful), rel=1e-6)
    theta = gaussian(seed + 2, width, width)
    assert kappa(harmful @ theta) <= star * kappa(primary @ theta) * (1 + 1e-6)
    best = immunizer.closed_form().theta_DD
    assert kappa(primary @ best) == pytest.approx(1, rel=1e-6)
    assert kappa(harmful @ best) == pytest.approx(star, rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 100_000), share=st.floats(0, 1))
def test_every_budget_is_on_the_frontier(seed, share):
    primary, harmful = spread_rows(seed, 9, 5, 1.5), spread_rows(seed + 1, 9, 5, 0.5)
    immunizer = LinearImmunizer(primary, harmful)
    budget = math.exp(share * math.log(kappa(primary)))
    theta = immunizer.closed_form(budget).theta_DD
    assert kappa(primary @ theta) == pytest.approx(budget, rel=1e-6)
    assert kappa(harmful @ theta) == pytest.approx(budget * immunizer.limit.condition_limit, rel=1e-6)
    assert float((primary @ theta).square().sum()) == pytest.approx(float(primary.square().sum()))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 100_000), method=st.sampled_from(["algorithm1", "ill_only", "opt_kappa", "imma"]))
def test_no_iterative_method_exceeds_the_limit(seed, method):
    primary, harmful = spread_rows(seed, 9, 5, 1.5), spread_rows(seed + 1, 9, 5, 0.5)
    immunizer = LinearImmunizer(
        primary, harmful, primary_labels=gaussian(seed + 2, 9), harmful_labels=gaussian(seed + 3, 9)
    )
    theta = getattr(immunizer, method)(epochs=10, strength=0.1, balance=1.0, seed=seed).theta_DD
    assert immunizer.report(theta).limit_fraction <= 1 + 1e-6
    assert kappa(harmful @ theta) <= immunizer.limit.condition_limit * kappa(primary @ theta) * (1 + 1e-6)


@st.composite
def unequal_ranges(draw):
    return [draw(st.integers(1, 4)), *(draw(st.integers(0, 2)) for _ in range(3))], draw(st.integers(0, 10_000))


@settings(max_examples=60, deadline=None)
@given(unequal_ranges())
def test_unequal_ranges_limit_holds_on_the_common_range_and_the_closed_form_attains_it_on_the_whole(pair):
    sizes, seed = pair
    primary, harmful, mu = block_pair(sizes, seed)
    width, star = sum(sizes), float(mu[0] / mu[-1])
    immunizer = LinearImmunizer(primary, harmful, tolerance=1e-9)
    theta = gaussian(seed + 4, width, width) + 2 * torch.eye(width, dtype=torch.float64)
    at_p, at_h = common_range_conditions(immunizer.pencil, theta)
    assert at_h <= star * at_p * (1 + 1e-5)
    best = immunizer.closed_form().theta_DD
    assert torch.linalg.matrix_rank(best) == width
    after = [factor_features(rows @ best, tolerance=1e-9) for rows in (primary, harmful)]
    assert after[0].condition_number == pytest.approx(1, rel=1e-5)
    assert after[1].condition_number == pytest.approx(star, rel=1e-5)


def test_a_harmful_only_direction_makes_the_whole_range_ratio_unbounded_but_not_the_common_one():
    primary, harmful = torch.diag(torch.tensor([1.0, 2.0, 0.0])).double(), torch.eye(3).double()
    immunizer = LinearImmunizer(primary, harmful)
    assert not immunizer.limit.whole_range_bounded and immunizer.limit.harmful_only_rank == 1
    ratios = []
    for scale in (1e2, 1e5):
        report = immunizer.report(torch.diag(torch.tensor([1.0, 1.0, scale])).double())
        assert report.common_ratio == pytest.approx(1)
        ratios.append(report.rank_aware.ratio)
    assert ratios == pytest.approx([1e4, 1e10])
    contained = LinearImmunizer(torch.eye(3).double(), primary)
    assert contained.limit.whole_range_bounded


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 100_000))
def test_harmful_range_inside_the_primary_one_bounds_every_invertible_extractor(seed):
    primary, harmful = spread_rows(seed, 9, 5, 1.0), spread_rows(seed + 1, 3, 5, 1.0)
    limit = immunization_limit(primary.T @ primary, harmful.T @ harmful)
    assert limit.whole_range_bounded and limit.primary_only_rank == 2
    theta = gaussian(seed + 2, 5, 5)
    assert kappa(harmful @ theta) <= limit.condition_limit * kappa(primary @ theta) * (1 + 1e-5)


def test_common_range_conditions_of_raw_features_are_schur_complements():
    primary, harmful, _ = block_pair([2, 1, 1, 0], 11)
    pencil = LinearImmunizer(primary, harmful, tolerance=1e-9).pencil
    null_h = factor_features(harmful, tolerance=1e-9).null_DZ
    null_p = factor_features(primary, tolerance=1e-9).null_DZ
    common = torch.linalg.qr(torch.cat([null_p, null_h], dim=1), mode="complete")[0][:, 2:]
    wanted = []
    for rows, null in ((primary, null_h), (harmful, null_p)):
        k = rows.T @ rows
        inner, cross = null.T @ k @ null, null.T @ k @ common
        values = torch.linalg.eigvalsh(common.T @ k @ common - cross.T @ torch.linalg.solve(inner, cross))
        wanted.append(float(values[-1] / values[0]))
    assert common_range_conditions(pencil) == pytest.approx(tuple(wanted), rel=1e-6)


@pytest.mark.parametrize("factor", [1.0, 9.0])
def test_proportional_covariances_say_no(factor):
    moment = spread_rows(0, 9, 4, 1.0)
    moment = moment.T @ moment
    limit = immunization_limit(moment, factor * moment)
    assert not limit.possible and "aligned" in limit.reason
    assert limit.ratio_limit == pytest.approx(1, rel=1e-6)
    assert limit.covariance_cosine == pytest.approx(1) and limit.commutator == pytest.approx(0, abs=1e-12)


def test_other_reasons_to_say_no():
    steep = torch.diag(torch.tensor([1.0, 10.0, 100.0])).double()
    already = immunization_limit(torch.eye(3).double(), steep)
    assert not already.possible and "share all eigenvectors" in already.reason
    single = immunization_limit(torch.diag(torch.tensor([1.0, 1.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0, 1.0])))
    assert not single.possible and "single direction" in single.reason
    assert immunization_limit(steep, torch.eye(3)).possible


def test_one_dimension_is_defined():
    immunizer = LinearImmunizer([[1.0], [2.0]], [[3.0], [1.0]])
    assert immunizer.limit.condition_limit == 1 and not immunizer.limit.possible
    theta = immunizer.closed_form().theta_DD
    assert theta.shape == (1, 1) and float(theta) != 0
    assert immunizer.algorithm1(epochs=2).theta_DD.shape == (1, 1)


def test_angles_of_matrices_we_built():
    rotation = torch.tensor([[math.cos(0.3), -math.sin(0.3)], [math.sin(0.3), math.cos(0.3)]]).double()
    diagonal = torch.diag(torch.tensor([2.0, 1.0])).double()
    turned = factor_features(diagonal @ rotation.T)
    straight = factor_features(diagonal)
    overlaps = eigenvector_overlaps(straight, turned)
    expected = [[math.cos(0.3) ** 2, math.sin(0.3) ** 2], [math.sin(0.3) ** 2, math.cos(0.3) ** 2]]
    np.testing.assert_allclose(overlaps.numpy(), expected, rtol=1e-6)
    cosine, commutator = covariance_angles(straight, turned)
    k_p, k_h = diagonal.square(), rotation @ diagonal.square() @ rotation.T
    assert cosine == pytest.approx(float((k_p * k_h).sum() / (k_p.norm() * k_h.norm())))
    assert commutator == pytest.approx(float((k_p @ k_h - k_h @ k_p).norm() / (2 * (k_p @ k_h).norm())))


@pytest.mark.parametrize(
    ("primary", "harmful", "message"),
    [
        (torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.eye(2), "symmetric"),
        (torch.full((2, 2), float("inf")), torch.eye(2), "finite"),
        (torch.eye(2), torch.zeros(2, 2), "zero matrix"),
        (torch.eye(2), torch.eye(3), "one width"),
        (torch.diag(torch.tensor([1.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0])), "share none"),
        (torch.eye(2), torch.ones(2, 3), "square"),
    ],
    ids=["non-symmetric", "non-finite", "zero", "widths", "disjoint", "not square"],
)
def test_bad_pairs_are_refused(primary, harmful, message):
    with pytest.raises(SpectrumError, match=message):
        immunization_limit(primary, harmful)


@pytest.mark.parametrize("budget", [0.5, 1e9, float("nan")])
def test_budgets_outside_the_frontier_are_refused(budget):
    with pytest.raises(ConfigError, match="Def. 3.1"):
        LinearImmunizer.from_moments(torch.eye(2) * 4, torch.eye(2)).closed_form(budget)
