"""The attack through a Moreau envelope, on losses whose envelope is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_immunize.errors import ConfigError
from hf_immunize.training.core.habits import Habits
from hf_immunize.training.core.moreau import MoreauAttack
from hf_immunize.training.core.registry import OF_DENOISERS
from hf_immunize.training.core.simulated import SimulatedAttack
from hf_immunize.training.core.weight_terms import AttackedTask

NEAR = 0.2


class Point(nn.Module):
    def __init__(self, width=5, seed=0):
        super().__init__()
        self.at = nn.Parameter(torch.randn(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def bowl(curvatures):
    """½ φᵀAφ − bᵀφ with the curvatures that were asked for."""
    generator = torch.Generator().manual_seed(1)
    basis, _ = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))
    return basis @ torch.diag(torch.tensor(curvatures).double()) @ basis.T, torch.randn(5, generator=generator).double()


def attack_of(model, matrix, pull, steps=400, solves=60, kind=MoreauAttack, **options):
    def loss(attacked, step, k):
        return attacked.at @ matrix @ attacked.at / 2 - pull @ attacked.at

    made = kind(AttackedTask(model, (), loss, 0), steps=steps, habits=Habits(4e-4, ("sgd",)), rank=0, **options)
    if kind is MoreauAttack:
        made._nearness, made._solves = NEAR, solves
    made.ceiling = 1e3
    return made


def envelope(theta, matrix, pull):
    """c − L at φ* = (I + γA)⁻¹(θ + γb)."""
    phi = torch.linalg.solve(torch.eye(5).double() + NEAR * matrix, theta + NEAR * pull)
    return 1e3 - (phi @ matrix @ phi / 2 - pull @ phi)


def test_value_and_gradient_are_those_of_the_envelope_in_closed_form():
    model, (matrix, pull) = Point(), bowl([0.1, 1.0, 2.0, 3.0, -1.0])
    before = model.at.detach().clone()
    value, gradient = attack_of(model, matrix, pull).gradient(model, 0)
    theta = before.clone().requires_grad_()
    truth = envelope(theta, matrix, pull)
    (slope,) = torch.autograd.grad(truth, theta)
    assert float(value) == pytest.approx(float(truth), rel=1e-9)
    assert torch.allclose(gradient["at"], slope, rtol=1e-5)
    assert torch.equal(model.at, before)
    first, _ = attack_of(model, matrix, pull, solves=0).gradient(model, 0)[1]["at"], None
    assert not torch.allclose(first, slope, rtol=0.05)  # the first-order gradient is another one


def test_where_the_solve_does_not_contract_the_first_order_gradient_is_kept():
    model, (matrix, pull) = Point(), bowl([8.0, 9.0, 10.0, 11.0, 12.0])  # γA > 1 everywhere
    found, plain = (attack_of(model, matrix, pull, solves=solves).gradient(model, 0)[1]["at"] for solves in (20, 0))
    assert torch.equal(found, plain) and bool(found.any())


def test_above_the_ceiling_there_is_nothing_to_gain():
    model, (matrix, pull) = Point(), bowl([1.0, 1.0, 2.0, 2.0, 3.0])
    attack = attack_of(model, matrix, pull, steps=5)
    attack.ceiling = -1e6
    value, gradient = attack.gradient(model, 0)
    assert float(value) == 0 and not bool(gradient["at"].any())


def test_held_loosely_and_unsolved_one_step_of_it_is_the_plain_attack():
    model, (matrix, pull) = Point(), bowl([0.1, 1.0, 2.0, 3.0, 4.0])
    attack = attack_of(model, matrix, pull, steps=1, solves=0)
    plain = attack_of(model, matrix, pull, steps=1, kind=SimulatedAttack)
    for found, truth in zip(attack.gradient(model, 0), plain.gradient(model, 0), strict=True):
        found, truth = (one["at"] if isinstance(one, dict) else one for one in (found, truth))
        assert torch.allclose(found, truth)


@pytest.mark.parametrize("options", [{}, {"attacker_depths": "vit.layernorm,classifier"}], ids=str)
def test_a_run_of_an_image_model_lowers_it_or_is_refused(options, make_trainer, make_vit):
    if options:
        with pytest.raises(ConfigError, match="objective simulated_attack for attacker_depths"):
            make_trainer(model=make_vit(), objective="resalign_moreau", **options)
        return
    trainer = make_trainer(
        model=make_vit(), objective="resalign_moreau", max_steps=25, per_device_harmful_batch_size=24,
        learning_rate=3e-3, attacker_learning_rate=1e-2, attacker_steps=2, weight="1", strength=1.0,
        primary_loss_weight=0.01,
    )
    trainer.train()
    assert trainer.outcome.terms_after["harmful_moreau_attack"] < trainer.outcome.terms_before["harmful_moreau_attack"]


@pytest.mark.parametrize("objective", ["esd", "meta_unlearning"])
def test_terms_of_denoisers_are_refused_for_image_models(objective, make_trainer, make_vit):
    with pytest.raises(ConfigError, match="expected objectives among"):
        make_trainer(model=make_vit(), objective=objective)
    model = make_vit()
    (term,) = OF_DENOISERS[objective]
    with pytest.raises(ConfigError, match="a diffusion pipeline for esd or meta_unlearning"):
        term.build(AttackedTask(model, (), lambda *_: torch.zeros(()), 0), None)
