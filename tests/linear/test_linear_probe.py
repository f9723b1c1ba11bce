"""Exact line search in the eigenbasis against gradient descent written out, and the attacker κ does not touch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_builders import gaussian, spread_rows

from hf_immunize.errors import DataError
from hf_immunize.linear import LinearImmunizer, line_search_probe


def written_out(features, labels, head, steps):
    """(‖w_t − w*‖²/‖w_0 − w*‖², excess loss) by plain gradient descent; w* is the minimizer nearest to w_0."""
    best = head + np.linalg.pinv(features) @ (labels - features @ head)
    floor = ((features @ best - labels) ** 2).sum()
    start, norms, losses = ((head - best) ** 2).sum(), [], []
    for _ in range(steps + 1):
        norms.append(((head - best) ** 2).sum() / start)
        losses.append((((features @ head - labels) ** 2).sum() - floor) / ((labels**2).sum() - floor))
        gradient = features.T @ (features @ head - labels)
        head = head - gradient * (gradient @ gradient) / ((features @ gradient) @ (features @ gradient))
    return np.array(norms), np.array(losses)


@pytest.mark.parametrize("rows", [20, 4], ids=["full rank", "rank deficient"])
def test_curves_are_those_of_written_out_gradient_descent(rows):
    features, labels = spread_rows(0, rows, 6, 0.5), gaussian(1, rows)
    curves = line_search_probe(features, labels, steps=12, seeds=3, first_seed=5)
    for index in range(3):
        head = torch.randn(6, generator=torch.Generator().manual_seed(5 + index)).double().numpy()
        norms, losses = written_out(features.numpy(), labels.numpy(), head, 12)
        np.testing.assert_allclose(curves.norm_ratio_ST[index].numpy(), norms, rtol=1e-6)
        np.testing.assert_allclose(curves.excess_loss_ST[index].numpy(), losses, rtol=1e-6, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), decades=st.floats(0, 2))
def test_loss_never_rises_and_obeys_the_condition_number_bound(seed, decades):
    features, labels = spread_rows(seed, 12, 4, decades), gaussian(seed + 1, 12)
    loss = line_search_probe(features, labels, steps=30, seeds=2).excess_loss_ST
    assert bool((loss[:, 1:] <= loss[:, :-1] * (1 + 1e-9) + 1e-14).all())
    sigma = torch.linalg.svdvals(features)
    kappa = float((sigma[0] / sigma[-1]).square())
    rate = ((kappa - 1) / (kappa + 1)) ** 2  # Kantorovich
    assert bool((loss[:, 1:] <= loss[:, :-1] * rate * (1 + 1e-6) + 1e-13).all())


def test_a_perfectly_conditioned_probe_and_a_whitening_attacker_need_one_step():
    features, labels = spread_rows(0, 20, 5, 2.0), gaussian(1, 20)
    whitened = line_search_probe(features, labels, steps=2, whitened=True)
    assert float(whitened.excess_loss_ST[:, 1].max()) < 1e-20
    assert line_search_probe(features, labels, steps=2).excess_loss_ST[0, 1] > 1e-4


def test_immunization_slows_the_raw_attacker_and_not_the_whitening_one():
    primary, harmful, labels = spread_rows(0, 40, 6, 0.5), spread_rows(9, 40, 6, 0.5), gaussian(1, 40)
    theta = LinearImmunizer(primary, harmful).closed_form(budget=2.0).theta_DD
    raw, immunized = (line_search_probe(x, labels, steps=400, initial_scale=0.0) for x in (harmful, harmful @ theta))
    base = raw.steps_to(0.01)[0]
    assert base is not None
    slowed = immunized.steps_to(0.01)[0]
    assert slowed is None or slowed > 2 * base
    for features in (harmful, harmful @ theta):
        assert line_search_probe(features, labels, steps=2, initial_scale=0.0, whitened=True).steps_to(1e-9)[0] == 1


def test_not_reached_is_none():
    curves = line_search_probe(spread_rows(0, 20, 5, 2.0), gaussian(1, 20), steps=1, seeds=2)
    assert curves.steps_to(1e-12) == [None, None] and curves.steps_to(1e9) == [0, 0]


def test_labels_that_cannot_be_probed_are_refused():
    with pytest.raises(DataError, match="expected 3 labels"):
        line_search_probe(torch.eye(3), torch.ones(2))
    with pytest.raises(DataError, match="zero head"):
        line_search_probe(torch.tensor([[1.0], [0.0]]), torch.tensor([0.0, 1.0]))
