"""Erasure objectives of a denoiser: each loss against its formula, each gradient by differences, each in a run."""

from __future__ import annotations

import copy

import pytest
import torch
from denoiser_builders import build_denoiser
from torch.func import functional_call

from hf_immunize.errors import ConfigError, DataError, ModelError
from hf_immunize.training.core.erasure import GUIDANCE, erased_target

F64 = torch.float64
NULL = {"encoder_hidden_states": torch.linspace(-1, 1, 60).reshape(1, 5, 12)}
SILENT = {"weight": "1", "strength": 1.0, "max_grad_norm": 0.0, "null_conditions": NULL}


@pytest.fixture
def at_work(make_trainer):
    """A trainer in float64 and the term at work in it."""

    def build(objective, family="unet", **options):
        model = build_denoiser(family, dtype=F64)
        trainer = make_trainer(family, model=model, dtype=F64, objective=objective, **(SILENT | options))
        (term,) = trainer.terms.weight_terms.objectives.values()
        return trainer, term

    return build


def moved(model, scale=0.05):
    generator, found = torch.Generator().manual_seed(3), copy.deepcopy(model)
    with torch.no_grad():
        for part in found.parameters():
            part += scale * torch.randn(part.shape, generator=generator, dtype=F64)
    return found


def answer(family, model, batch, weights=None, unnamed=False):
    """By the model's own forward; without a name: no class embedding at all, or the embedding of the empty prompt."""
    weights = dict(model.named_parameters()) if weights is None else dict(weights)
    if family == "unet":
        if unnamed:
            weights["class_embedding.weight"] = torch.zeros_like(weights["class_embedding.weight"])
        told = (batch.noisy, batch.timesteps, batch.conditions["class_labels"])
        return functional_call(model, weights, told).sample
    if family == "dit":
        labels = torch.full_like(batch.labels, 10) if unnamed else batch.conditions["class_labels"]
        told = {"timestep": batch.timesteps, "class_labels": labels}
        return functional_call(model, weights, (batch.noisy,), told).sample[:, :4]
    text = batch.conditions["encoder_hidden_states"]
    text = NULL["encoder_hidden_states"].double().expand_as(text) if unnamed else text
    return functional_call(model, weights, (batch.noisy, batch.timesteps, text)).sample


@pytest.mark.parametrize("family", ["unet", "sd", "dit"])
def test_esd_is_its_formula_and_has_its_gradient(family, at_work):
    trainer, term = at_work("esd", family)
    base, model = copy.deepcopy(trainer.bare).eval(), moved(trainer.bare).eval()
    batch = trainer._batch(trainer.streams.attack.concept, 2)
    with torch.no_grad():
        named, unnamed = (answer(family, base, batch, unnamed=without) for without in (False, True))
    weights = {name: part.detach().clone().requires_grad_() for name, part in model.named_parameters()}
    total = 0.0
    for mine, own, none in zip(answer(family, model, batch, weights), named, unnamed, strict=True):
        total = total + (mine - none + 1.0 * (own - none)).square().mean() / len(named)
    truth = dict(zip(weights, torch.autograd.grad(total, list(weights.values()), materialize_grads=True), strict=True))
    value, gradient = term.gradient(model, 2)
    assert float(value) == pytest.approx(float(total.detach()), rel=1e-10)
    assert all(torch.allclose(gradient[name], part, rtol=1e-8, atol=1e-13) for name, part in truth.items())
    at_base = float(term.gradient(base, 2)[0])
    assert at_base == pytest.approx((1 + GUIDANCE) ** 2 * float((named - unnamed).square().mean()), rel=1e-10)
    assert float(term.gradient(model, 3)[0]) != float(value)  # other rows


def test_the_target_of_esd_says_the_same_of_noise_and_of_velocities():
    named, unnamed, noisy = torch.randn(3, 6, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    signal, noise = 0.8, 0.6

    def velocity(epsilon):
        return (epsilon - noise * noisy) / signal  # v = (ε − n x_t)/s for s² + n² = 1

    target = erased_target(velocity(named), velocity(unnamed))
    assert torch.allclose(target, velocity(erased_target(named, unnamed)))
    assert torch.allclose(erased_target(named, unnamed, 0.0), unnamed)


def gradients(family, model, batch):
    loss = (answer(family, model, batch) - batch.target).square().mean()
    found = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    return torch.cat([part.flatten() for part in found])


@pytest.mark.parametrize("family", ["unet", "sd"])
def test_the_meta_objective_is_the_cosine_of_two_gradients_and_has_its_gradient(family, at_work):
    trainer, term = at_work("meta_unlearning", family)
    model = moved(trainer.bare).eval()
    a = gradients(family, model, trainer._batch(trainer.streams.attack.concept, 2))
    b = gradients(family, model, trainer._batch(trainer.streams.attack.names, 2))
    value, gradient = term.gradient(model, 2)
    assert float(value) == pytest.approx(1 + float(torch.nn.functional.cosine_similarity(a, b, dim=0)), rel=1e-9)
    generator, ends = torch.Generator().manual_seed(1), []
    direction = {name: torch.randn(part.shape, generator=generator, dtype=F64) for name, part in gradient.items()}
    for sign in (1, -1):
        shifted = copy.deepcopy(model)
        with torch.no_grad():
            for name, part in shifted.named_parameters():
                part += sign * 1e-6 * direction[name]
        ends.append(float(term.gradient(shifted, 2)[0]))
    told = sum(float((gradient[name] * part).sum()) for name, part in direction.items())
    assert told == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4)


def test_a_step_that_relearns_changes_what_is_retained_as_the_cosine_says(at_work):
    """To first order L_R falls by τ·cos·‖∇L_R‖ under a step of length τ down L_H."""
    trainer, term = at_work("meta_unlearning")
    model = moved(trainer.bare).eval()
    concept, retained = (trainer._batch(getattr(trainer.streams.attack, name), 0) for name in ("concept", "names"))
    a, b = gradients("unet", model, concept), gradients("unet", model, retained)
    after, place = copy.deepcopy(model), 0
    with torch.no_grad():
        for part in after.parameters():
            part -= 1e-5 * (a / a.norm())[place : place + part.numel()].reshape(part.shape)
            place += part.numel()
        losses = [float((answer("unet", one, retained) - retained.target).square().mean()) for one in (model, after)]
    cosine = float(term.gradient(model, 0)[0]) - 1
    assert losses[1] - losses[0] == pytest.approx(-1e-5 * cosine * float(b.norm()), rel=1e-2)


def test_a_gradient_of_zero_has_no_angle(at_work):
    trainer, term = at_work("meta_unlearning")
    term._slopes = lambda weights, *_: [torch.zeros_like(part) for part in weights]
    value, gradient = term.gradient(trainer.bare, 0)
    assert float(value) == 1 and not any(bool(part.any()) for part in gradient.values())


OTHER_FAMILIES = ("sd", "dit", "flux")
RUN = {"max_steps": 10, "learning_rate": 1e-3, "weight": "1", "strength": 1.0, "primary_loss_weight": 1e-4,
       "attacker_steps": 2, "attacker_learning_rate": 1e-2, "null_conditions": NULL}  # fmt: skip


@pytest.mark.parametrize(
    ("objective", "term"),
    [("esd", "harmful_erasure"), ("meta_unlearning", "harmful_relearning_cosine"),
     ("resalign_moreau", "harmful_moreau_attack")],
)  # fmt: skip
@pytest.mark.parametrize("family", ["unet", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHER_FAMILIES)])
def test_a_run_lowers_its_term(family, objective, term, make_trainer):
    null = NULL | {"pooled_projections": torch.zeros(1, 10)}
    trainer = make_trainer(family, objective=objective, **(RUN | {"null_conditions": null}))
    types = [type(part) for part in build_denoiser(family).modules()]
    trainer.train()
    assert trainer.outcome.terms_after[term] < trainer.outcome.terms_before[term]
    assert [type(part) for part in trainer.bare.modules()] == types


def test_erasure_joined_with_its_meta_objective_resumes_exactly(make_trainer, tmp_path):
    options = {"objective": "esd+meta_unlearning+simulated_attack", "attacker_steps": 1, "max_steps": 4,
               "save_steps": 2, "save_total_limit": 3, "attacker_conditions": "none,learned"}  # fmt: skip
    whole = make_trainer(**options)
    whole.train()
    after = whole.bare.state_dict()
    assert {"harmful_erasure", "harmful_relearning_cosine", "harmful_simulated_attack"} <= whole.log_history[-1].keys()
    resumed = make_trainer(**options)
    resumed.train(tmp_path / "run" / "checkpoint-2")
    assert all(torch.equal(value, after[name]) for name, value in resumed.bare.state_dict().items())


def test_factors_are_trained_against_erasure_as_weights_are(make_trainer):
    trainer = make_trainer(objective="esd", trainable_modules="lora", lora_rank=2, learning_rate=1e-2, max_steps=8,
                           weight="1", strength=1.0, primary_loss_weight=0.01)  # fmt: skip
    trainer.train()
    assert trainer.outcome.terms_after["harmful_erasure"] < trainer.outcome.terms_before["harmful_erasure"]


def test_what_cannot_be_is_refused(make_trainer, at_work, monkeypatch):
    with pytest.raises(DataError, match="null_conditions"):
        make_trainer("sd", objective="esd")
    with pytest.raises(ConfigError, match="attacker_rank=0 for resalign_moreau"):
        make_trainer(objective="resalign_moreau", attacker_rank=2)
    trainer, term = at_work("meta_unlearning")
    monkeypatch.setattr("hf_immunize.training.core.unrolled.opaque_operations", lambda _: {"CompiledBackward"})
    with pytest.raises(ModelError, match="own operations for meta_unlearning, got CompiledBackward"):
        term.gradient(trainer.bare, 0)
