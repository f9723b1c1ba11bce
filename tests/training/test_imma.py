"""The simulated attacker against plain autograd through torch.optim-like steps; it goes on from step to step."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from hf_immunize.regularizers import alternate_within_classes, simulated_attacker
from hf_immunize.training.core.registry import terms_of
from hf_immunize.training.core.terms import Rows, TermSettings, evaluate_terms


def blobs(rows=24, width=5, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % 3
    return torch.randn(rows, width, generator=generator, dtype=torch.float64) + spread * labels[:, None], labels


def by_hand(features, labels, weights, bias, rate, steps):
    """The same value with gradients of the inner steps from autograd."""
    support, query = alternate_within_classes(labels)
    centred = features - features[support].mean(dim=0)
    weights, bias = weights.clone().requires_grad_(), bias.clone().requires_grad_()
    for _ in range(steps):
        loss = functional.cross_entropy(centred[support] @ weights + bias, labels[support])
        dw, db = torch.autograd.grad(loss, (weights, bias), create_graph=True)
        weights, bias = weights - rate * dw, bias - rate * db
    loss = functional.cross_entropy(centred[query] @ weights + bias, labels[query])
    return torch.relu(1 - loss / math.log(len(bias)))


def test_value_and_gradient_are_those_of_the_unrolled_attacker():
    features, labels = blobs()
    generator = torch.Generator().manual_seed(1)
    start = (
        0.1 * torch.randn(5, 3, generator=generator, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    )  # fmt: skip
    rate = torch.tensor(0.1, dtype=torch.float64)
    ours, theirs = features.clone().requires_grad_(), features.clone().requires_grad_()
    value, (weights, _) = simulated_attacker(ours, labels, start, rate=rate, steps=3)
    truth = by_hand(theirs, labels, *start, rate, 3)
    assert float(value) == pytest.approx(float(truth), rel=1e-12) and float(value) > 0
    assert not weights.requires_grad
    value.backward()
    truth.backward()
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-9, atol=1e-14)


def test_the_attacker_is_kept_and_gets_better_at_features_that_stay():
    features, labels = blobs(spread=2.0)
    rows = {"primary": Rows(features, labels), "harmful": Rows(features, labels)}
    memory: dict = {}
    terms, settings = terms_of("imma"), TermSettings(attacker_steps=2, harmful_classes=3)
    values = [
        float(evaluate_terms(terms, rows, settings, memory=memory).values["harmful_attacker_gain"]) for _ in range(30)
    ]
    assert values[-1] > values[5] > values[0] > 0
    assert memory["harmful_attacker_gain"]["weights"].shape == (5, 3)
    forgetful = [float(evaluate_terms(terms, rows, settings).values["harmful_attacker_gain"]) for _ in range(2)]
    assert forgetful == [pytest.approx(values[0])] * 2


def test_rescaling_features_changes_nothing_for_the_attacker():
    features, labels = blobs()
    values = []
    for scale in (1.0, 1e-3, 1e3):
        rows = {side: Rows(scale * features, labels) for side in ("primary", "harmful")}
        values.append(float(evaluate_terms(terms_of("imma"), rows, TermSettings()).values["harmful_attacker_gain"]))
    assert values == pytest.approx([values[0]] * 3, rel=1e-9)


def test_training_lowers_what_the_attacker_gains(make_trainer):
    trainer = make_trainer(objective="imma", strength=3.0, max_steps=30, learning_rate=3e-3)
    trainer.train()
    gains = [entry["harmful_attacker_gain"] for entry in trainer.state.log_history if "loss" in entry]
    assert max(gains) > 0.05 and gains[-1] < 0.5 * max(gains)
