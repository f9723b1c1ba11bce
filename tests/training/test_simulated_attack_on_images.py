"""The simulated attack on an image model: its loss, its gradient, and that it raises what an attacker ends at."""

from __future__ import annotations

import copy

import pytest
import torch
from step_builders import relative_error

from hf_immunize.errors import ConfigError
from hf_immunize.training import OBJECTIVES, register_objective
from hf_immunize.training.core.weight_terms import WeightTerm
from hf_immunize.training.vision.harmful_loss import refitted_answers_loss, refitted_head_loss

TERM = "harmful_simulated_attack"


def slow_error(features, labels, horizon):
    """1 − held-out R² of ridge heads, each fitted by solving its normal equations; halves by turns within classes."""
    halves = ([], [])
    for label in labels.unique():
        for place, row in enumerate((labels == label).nonzero().flatten().tolist()):
            halves[place % 2].append(row)
    return slow_ridge_error(features, torch.nn.functional.one_hot(labels).double(), halves, horizon)


def slow_ridge_error(features, targets, halves, horizon):
    errors = []
    for learn, judge in (halves, halves[::-1]):
        center, mean = features[learn].mean(0), targets[learn].mean(0)
        x, y = features[learn] - center, targets[learn] - mean
        moment = x.T @ x / len(learn)
        ridge = torch.linalg.eigvalsh(moment.detach())[-1] / horizon  # the attacker's choice, not a way out
        head = torch.linalg.solve(moment + ridge * torch.eye(len(moment)).double(), x.T @ y / len(learn))
        left = targets[judge] - mean - (features[judge] - center) @ head
        errors.append(left.square().sum() / (targets[judge] - mean).square().sum())
    return torch.stack(errors).mean()


@pytest.mark.parametrize("columns", [1, 3])
def test_answers_that_are_numbers_are_learned_by_a_refitted_head_as_well(columns):
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(18, 4, generator=generator, dtype=torch.float64)
    answers = features[:, :columns] + torch.randn(18, columns, generator=generator, dtype=torch.float64) / 4
    halves = [list(range(start, 18, 2)) for start in (0, 1)]
    features.requires_grad_()
    loss = refitted_answers_loss(features, answers, 50.0)
    truth = slow_ridge_error(features, answers, halves, 50.0)
    assert 0 < float(loss.detach()) < 1
    assert float(loss.detach()) == pytest.approx(float(truth.detach()), rel=1e-9)
    (ours,), (theirs,) = torch.autograd.grad(loss, features), torch.autograd.grad(truth, features)
    assert torch.allclose(ours, theirs, atol=1e-12)


def test_answers_that_do_not_differ_teach_nothing():
    features = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = refitted_answers_loss(features, torch.ones(8, 2), 50.0)
    (gradient,) = torch.autograd.grad(loss, features)
    assert float(loss.detach()) == 1 and not gradient.any()


def test_the_loss_is_the_held_out_error_of_a_refitted_head_and_so_is_its_gradient():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(18, 4, generator=generator, dtype=torch.float64)
    labels = torch.arange(18) % 3
    features[:, 0] += labels
    features.requires_grad_()
    loss = refitted_head_loss(features, labels, 50.0, 3)
    assert float(loss.detach()) == pytest.approx(float(slow_error(features.detach(), labels, 50.0)), rel=1e-9)
    (ours,) = torch.autograd.grad(loss, features)
    (truth,) = torch.autograd.grad(slow_error(features, labels, 50.0), features)
    assert torch.allclose(ours, truth, atol=1e-12)


def test_a_step_is_the_attack_written_out(make_trainer, make_vit, keep_gradients):
    model = make_vit(dtype=torch.float64)
    before = copy.deepcopy(model)
    trainer = make_trainer(
        model=model, objective="simulated_attack", weight="1", strength=1.0, attacker_steps=2, primary_loss_weight=1e-9,
        horizon="100",
        attacker_learning_rate=1e-2, learning_rate=0.0, max_steps=1, max_grad_norm=0.0, callbacks=[keep_gradients],
    )
    trainer.train()
    attacker = before.train()
    optimizer = torch.optim.AdamW(attacker.parameters(), lr=1e-2, weight_decay=0.0)
    truth = {name: torch.zeros_like(value) for name, value in attacker.named_parameters()}
    for k in range(3):
        rows = trainer._attack_batch(k)
        features = attacker.vit(rows["pixel_values"]).last_hidden_state[:, 0]
        loss = slow_error(features, rows["labels"], 100.0)
        optimizer.zero_grad()
        loss.backward()
        for name, value in attacker.named_parameters():
            if k > 0 and float(loss.detach()) < 1 and value.grad is not None:
                truth[name] -= value.grad / 2
        optimizer.step()
    moved = {name: value for name, value in truth.items() if bool(value.any())}
    assert len(moved) > 10
    assert relative_error({name: keep_gradients.steps[0][name] for name in moved}, moved) < 1e-6


def test_an_attacker_ends_at_a_higher_loss(make_trainer, make_vit):
    trainer = make_trainer(
        model=make_vit(), objective="simulated_attack", max_steps=30, per_device_harmful_batch_size=30,
        attacker_learning_rate=1e-2, horizon="100", strength=0.1,  # defaults are tried on digits, in test_outcome.py
    )
    trainer.train()
    values = [entry[TERM] for entry in trainer.state.log_history if TERM in entry]
    assert sum(values[-5:]) < 0.8 * sum(values[:5])
    assert trainer.outcome.terms_after[TERM] < trainer.outcome.terms_before[TERM]


def test_terms_on_weights_join_terms_on_features_and_resume_with_them(make_trainer, make_vit, tmp_path):
    options = {"objective": "ill_only+simulated_attack", "attacker_rank": 2, "max_steps": 4, "save_strategy": "steps",
               "save_steps": 2, "attacker_steps": 2}
    whole = make_trainer(model=make_vit(), **options)
    whole.train()
    again = make_trainer(model=make_vit(), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for name, value in whole.model.state_dict().items():
        assert torch.allclose(value, again.model.state_dict()[name], atol=1e-6), name
    assert {TERM, "harmful_r_ill", f"lambda/{TERM}"} <= {name for entry in again.state.log_history for name in entry}


class _Norm:
    """Half the squared distance of the classifier's weights from zero: an objective of a user's own."""

    ceiling = float("inf")

    def gradient(self, model, step):
        weight = model.classifier.weight
        zeros = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
        return weight.detach().square().sum() / 2, zeros | {"classifier.weight": weight.detach().clone()}

    def state(self):
        return {}

    def load_state(self, state):
        pass


def test_a_term_of_ones_own_on_weights_is_registered_like_one_on_features(make_trainer, make_vit):
    register_objective("small_head", WeightTerm("head_norm", lambda task, options: _Norm()))
    try:
        model = make_vit()
        before = float(model.classifier.weight.detach().norm())
        make_trainer(model=model, objective="small_head", weight="1", strength=10.0, learning_rate=1e-2).train()
        assert float(model.classifier.weight.detach().norm()) < 0.9 * before
    finally:
        OBJECTIVES.pop("small_head")


def test_cached_features_and_an_attacker_of_all_weights_exclude_each_other(make_trainer):
    with pytest.raises(ConfigError, match="attacker_rank"):
        make_trainer(objective="simulated_attack", cache_frozen_features=True, trainable_modules="last:1")
