"""Objectives of other defences: each loss against a slow truth, each gradient by finite differences, each in a run."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from step_builders import relative_error

from hf_immunize.training.core.draws import generator_of
from hf_immunize.training.core.field_terms import noise_discrepancy, probe_trap
from hf_immunize.training.core.headed import (
    gain_below_chance,
    inverse_cross_entropy,
    missing_entropy,
    uniform_divergence,
)

AIMS = {
    "sophon_ice": (inverse_cross_entropy, "harmful_inverse_cross_entropy"),
    "sophon_klu": (uniform_divergence, "harmful_uniform_divergence"),
    "tar_entropy": (missing_entropy, "harmful_missing_entropy"),
}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_aim(name, logits, labels):
    """Row by row, from probabilities."""
    total = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        whole = sum(math.exp(value) for value in row)
        p = [math.exp(value) / whole for value in row]
        if name == "sophon_ice":
            total -= math.log(1 - p[label])
        elif name == "sophon_klu":
            total += sum((1 / len(p)) * math.log((1 / len(p)) / one) for one in p)
        else:
            total += math.log(len(p)) + sum(one * math.log(one) for one in p)
    return total / len(logits)


@pytest.mark.parametrize("name", AIMS)
def test_an_aim_is_its_formula_is_never_negative_and_has_its_gradient(name):
    aim, logits, labels = AIMS[name][0], 2 * draw(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    assert float(aim(logits, labels)) == pytest.approx(slow_aim(name, logits, labels), rel=1e-12)
    assert torch.autograd.gradcheck(lambda x: aim(x, labels), logits.requires_grad_())
    best = torch.zeros(6, 4, dtype=torch.float64)
    if name == "sophon_ice":
        best = best.index_put((torch.arange(6), labels), torch.tensor(-800.0).double())
    assert 0 <= float(aim(best, labels)) < 1e-12
    sure = 40 * torch.nn.functional.one_hot(labels, 4).double()
    assert math.isfinite(float(aim(sure, labels))) and float(aim(sure, labels)) > 1  # p_y = 1 up to rounding


def test_a_fresh_heads_gain_ends_at_chance():
    labels, sure = torch.tensor([0, 1, 2, 0]), torch.nn.functional.one_hot(torch.tensor([0, 1, 2, 0]), 3).double()
    losses = [-math.log(math.e**2 / (math.e**2 + 2))] * 4
    assert float(gain_below_chance(2 * sure, labels)) == pytest.approx(1 - sum(losses) / 4 / math.log(3))
    assert float(gain_below_chance(-2 * sure, labels)) == 0
    assert torch.autograd.gradcheck(lambda x: gain_below_chance(x, labels), (2 * sure).requires_grad_())


def test_the_noise_term_is_the_mmd_of_drawn_noise_and_zero_at_noise_itself():
    rows, noise = draw(40, 6) * 1.5 + 0.7, draw(6000, 6, seed=1)

    def kernel(a, b):
        return torch.stack([torch.exp(-torch.cdist(a, b).square() / (2 * s * 6)) for s in (0.5, 1, 2, 4)]).mean(0)

    drawn = kernel(rows, rows).mean() - 2 * kernel(rows, noise).mean() + kernel(noise[:500], noise[500:]).mean()
    assert float(noise_discrepancy(rows)) == pytest.approx(float(drawn), abs=6e-3)
    near, far = float(noise_discrepancy(draw(1000, 6, seed=2))), float(noise_discrepancy(rows))
    assert 0 < near < 2e-3 < 0.05 < far
    assert torch.autograd.gradcheck(noise_discrepancy, draw(5, 3).requires_grad_())


def test_descending_the_noise_term_takes_what_tells_the_classes_apart():
    labels = torch.arange(60) % 3
    rows = (draw(60, 4) * 0.3 + 2 * torch.nn.functional.one_hot(labels, 4)).requires_grad_()
    optimizer = torch.optim.Adam([rows], 0.05)
    for _ in range(150):
        optimizer.zero_grad()
        noise_discrepancy(rows).backward()
        optimizer.step()

    def between(features):
        means = torch.stack([features[labels == label].mean(0) for label in range(3)])
        return float(means.var(dim=0).sum() / features.var(dim=0).sum())

    start = draw(60, 4) * 0.3 + 2 * torch.nn.functional.one_hot(labels, 4)
    assert between(rows.detach()) < 0.5 * between(start)


def test_the_trap_is_the_gain_beyond_the_quadratic_of_autograd():
    features, labels = draw(12, 3), torch.arange(12) % 3
    features[:, 0] += labels
    centred = features - features.mean(dim=0)
    x = centred / (torch.linalg.eigvalsh(centred.T @ centred / 12)[-1]).sqrt()
    start = torch.stack([x[labels == label].mean(0) for label in range(3)], dim=1)

    def loss(weights):
        return torch.nn.functional.cross_entropy(x @ weights, labels)

    weights = start.clone()
    for _ in range(3):
        leaf = weights.clone().requires_grad_()
        weights = weights - torch.autograd.grad(loss(leaf), leaf)[0]
    delta = (weights - start).flatten()
    leaf = start.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(leaf), leaf)
    hessian = torch.autograd.functional.hessian(loss, start).reshape(9, 9)
    expected = -(slope.flatten() @ delta + delta @ hessian @ delta / 2)
    truth = torch.nn.functional.softplus(loss(start) - loss(weights) - expected)
    assert float(probe_trap(features, labels, 3)) == pytest.approx(float(truth), rel=1e-10)


def test_the_gradient_of_the_trap_is_that_of_finite_differences_with_the_scale_held():
    features, labels = draw(8, 3, seed=3), torch.arange(8) % 2
    features.requires_grad_()
    (ours,) = torch.autograd.grad(probe_trap(features, labels, 2), features)
    direction = draw(8, 3, seed=4)
    direction -= direction.mean(dim=0)  # centring is held as well
    u, s, v = torch.linalg.svd((features - features.mean(dim=0)).detach(), full_matrices=False)
    direction -= (u[:, 0] @ direction @ v[0]) * torch.outer(u[:, 0], v[0])  # to first order σ₁ does not move
    ends = [float(probe_trap((features + sign * 1e-5 * direction).detach(), labels, 2)) for sign in (1, -1)]
    assert float((ours * direction).sum()) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4)


@pytest.mark.parametrize("name", AIMS)
def test_a_step_against_an_attacker_with_a_head_is_the_attack_written_out(name, make_trainer, make_vit, keep_gradients):
    model = make_vit(dtype=torch.float64)
    before = copy.deepcopy(model).train()
    trainer = make_trainer(
        model=model, objective=name, weight="1", strength=1.0, attacker_steps=2, primary_loss_weight=1e-9,
        attacker_learning_rate=1e-2, learning_rate=0.0, max_steps=1, max_grad_norm=0.0, callbacks=[keep_gradients],
    )
    trainer.train()
    width = before.config.hidden_size
    drawn = torch.rand(3, width + 1, generator=generator_of(trainer.args.seed, "head", 0), dtype=torch.float64)
    head = torch.nn.Linear(width, 3, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_((2 * drawn - 1)[:, :-1] * width**-0.5)
        head.bias.copy_((2 * drawn - 1)[:, -1] * width**-0.5)
    optimizer = torch.optim.AdamW([*before.parameters(), *head.parameters()], lr=1e-2, weight_decay=0.0)
    truth = {key: torch.zeros_like(value) for key, value in before.named_parameters()}
    for k in range(3):
        rows = trainer._attack_batch(k)
        logits = head(before.vit(rows["pixel_values"]).last_hidden_state[:, 0])
        if k > 0:
            optimizer.zero_grad()
            AIMS[name][0](logits, rows["labels"]).backward(retain_graph=True)
            for key, value in before.named_parameters():
                truth[key] += 0 if value.grad is None else value.grad / 2
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, rows["labels"]).backward()
        optimizer.step()
    moved = {key: value for key, value in truth.items() if bool(value.any())}
    assert len(moved) > 10
    assert relative_error({key: keep_gradients.steps[0][key] for key in moved}, moved) < 1e-6


@pytest.mark.parametrize(
    ("name", "term"), [
        ("sophon_ice", AIMS["sophon_ice"][1]),
        pytest.param("sophon_klu", AIMS["sophon_klu"][1], marks=pytest.mark.slow),
        pytest.param("tar_entropy", AIMS["tar_entropy"][1], marks=pytest.mark.slow), ("rep_noise", "harmful_noise_mmd"),
        ("trap", "harmful_probe_trap"),
    ],
)  # fmt: skip
def test_a_run_lowers_its_term(name, term, make_trainer, make_vit):
    trainer = make_trainer(
        model=make_vit(), objective=name, max_steps=25, per_device_harmful_batch_size=24, learning_rate=3e-3,
        attacker_learning_rate=1e-2, attacker_steps=2, weight="1", strength=1.0, primary_loss_weight=0.01,
    )
    trainer.train()
    assert trainer.outcome.terms_after[term] < trainer.outcome.terms_before[term]
