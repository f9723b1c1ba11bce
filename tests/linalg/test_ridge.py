"""Ridge solve, A_t and spectral steps against slow independent truths."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from hf_immunize.errors import SpectrumError
from hf_immunize.linalg import ridge_weights, spectral_adversary, spectral_steps


def rows(count: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 20), st.integers(1, 20), st.floats(-6, 2), st.integers(0, 999))
def test_ridge_weights_equal_scikit_learn(count, width, log_penalty, seed):
    phi, labels, penalty = rows(count, width, seed), rows(count, 3, seed + 1), 10.0**log_penalty
    ours = ridge_weights(phi, labels, torch.tensor(penalty, dtype=torch.float64))
    truth = Ridge(alpha=penalty, fit_intercept=False, solver="svd").fit(phi.numpy(), labels.numpy()).coef_.T
    assert np.allclose(ours.numpy(), truth, rtol=1e-6, atol=1e-8)


@settings(max_examples=30, deadline=None)
@given(st.integers(4, 16), st.integers(1, 16), st.floats(0, 4), st.integers(0, 999))
def test_adversary_r_squared_equals_a_probe_fitted_by_scikit_learn(count, width, log_horizon, seed):
    support, query = rows(count, width, seed), rows(count, width, seed + 1)
    labels, query_labels = rows(count, 2, seed + 2), rows(count, 2, seed + 3)
    held_out, seen = spectral_adversary(support, labels, query, query_labels, 10**log_horizon)
    centred = support - support.mean(0)
    penalty = np.linalg.svd(centred.numpy(), compute_uv=False)[0] ** 2 / 10**log_horizon
    probe = Ridge(alpha=penalty, solver="svd").fit(support.numpy(), labels.numpy())
    for answer, features, target in ((held_out, query, query_labels), (seen, support, labels)):
        residual = ((target.numpy() - probe.predict(features.numpy()).reshape(target.shape)) ** 2).sum()
        total = ((target - labels.mean(0)) ** 2).sum().item()
        assert float(answer) == pytest.approx(1 - residual / total, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("width", [3, 12], ids=["N>d", "N<d"])
def test_adversary_gradient_matches_finite_differences_where_sigma_is_held(width):
    support, query = rows(8, width, 0), rows(8, width, 1).requires_grad_()
    labels, query_labels = rows(8, 2, 2), rows(8, 2, 3)
    measure = lambda phi: spectral_adversary(support, labels, phi, query_labels, 50.0)[0]  # noqa: E731
    assert torch.autograd.gradcheck(measure, query, rtol=1e-5)


def test_adversary_support_gradient_matches_finite_differences_with_a_fixed_penalty():
    support, labels = rows(8, 3, 0).requires_grad_(), rows(8, 2, 2)
    query, query_labels = rows(8, 3, 1), rows(8, 2, 3)
    centred = (support - support.mean(0)).detach()
    penalty = torch.linalg.matrix_norm(centred, 2) ** 2 / 50.0

    def by_hand(phi):
        weights = ridge_weights(phi - phi.mean(0), labels - labels.mean(0), penalty)
        residual = query_labels - labels.mean(0) - (query - phi.mean(0)) @ weights
        return 1 - residual.square().sum() / (query_labels - labels.mean(0)).square().sum()

    (ours,) = torch.autograd.grad(spectral_adversary(support, labels, query, query_labels, 50.0)[0], support)
    (truth,) = torch.autograd.grad(by_hand(support), support)
    assert torch.autograd.gradcheck(by_hand, support, rtol=1e-5)
    assert torch.allclose(ours, truth, rtol=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.floats(-6, 6), st.integers(0, 99))
def test_adversary_does_not_see_the_scale_of_the_features(log_scale, seed):
    support, query, labels = rows(10, 4, seed), rows(10, 4, seed + 1), rows(10, 2, seed + 2)
    plain = spectral_adversary(support, labels, query, labels, 100.0)[0]
    scaled = spectral_adversary(support * 10**log_scale, labels, query * 10**log_scale, labels, 100.0)[0]
    assert float(scaled) == pytest.approx(float(plain), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_collapsed_features_give_zero_and_finite_gradients(value):
    support = torch.full((6, 4), value, requires_grad=True)
    labels = torch.eye(2).repeat(3, 1)
    held_out, _ = spectral_adversary(support, labels, torch.full((6, 4), value), labels, 1e6)
    held_out.backward()
    assert float(held_out) == pytest.approx(0, abs=1e-6)
    assert torch.isfinite(support.grad).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 8), st.floats(0, 3), st.floats(0.05, 0.9), st.integers(0, 999))
def test_spectral_steps_equal_gradient_descent_counted_by_hand(width, log_kappa, tolerance, seed):
    phi = rows(width + 6, width, seed)
    phi = (phi - phi.mean(0)) * torch.logspace(0, -log_kappa / 2, width, dtype=torch.float64)
    phi = phi - phi.mean(0)
    labels = phi @ rows(width, 2, seed + 1)
    steps = spectral_steps(phi, labels, tolerance)
    rate, weights = 1 / torch.linalg.matrix_norm(phi, 2) ** 2, torch.zeros(width, 2, dtype=torch.float64)
    count, total = 0, labels.square().sum()
    while (labels - phi @ weights).square().sum() > tolerance * total and count < 20000:
        weights = weights + rate * phi.T @ (labels - phi @ weights)
        count += 1
    if count < 20000:
        assert count - 1 <= steps <= count + 1e-6


def test_spectral_steps_are_infinite_when_the_labels_are_not_in_the_features():
    phi = torch.zeros(6, 2, dtype=torch.float64)
    phi[:, 0] = torch.tensor([1.0, -1, 0, 0, 0, 0])
    labels = torch.tensor([[0.0], [0], [1], [-1], [0], [0]])
    assert spectral_steps(phi, labels, 0.2) == float("inf")


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: spectral_steps(torch.eye(3), torch.ones(3, 1), 0.2), "constant labels"),
        (lambda: spectral_steps(torch.eye(3), torch.eye(3), 0.0), "between 0 and 1"),
        (lambda: spectral_adversary(torch.eye(3), torch.eye(3), torch.ones(3, 2), torch.eye(3), 1.0), "one width"),
        (lambda: spectral_adversary(torch.ones(1, 3), torch.eye(1), torch.eye(3), torch.eye(3), 1.0), "two support"),
        (lambda: spectral_adversary(torch.eye(3), torch.eye(3), torch.eye(3), torch.eye(3), 0.0), "positive horizon"),
    ],
)
def test_bad_input_says_what_to_do(call, message):
    with pytest.raises(SpectrumError, match=message):
        call()
