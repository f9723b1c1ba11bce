"""The simulated attack against the same attack written out with plain torch, on one process."""

from __future__ import annotations

import copy

import pytest
import torch
from denoiser_builders import build_denoiser, build_examples, build_scheduler
from safetensors.torch import load_file

from hf_immunize.diffusion import NoiseProcess, denoiser_of
from hf_immunize.training.core.attacker import Attacker
from hf_immunize.training.core.habits import Habits
from hf_immunize.training.core.simulated import SimulatedAttack
from hf_immunize.training.diffusion.factors import put_factors
from hf_immunize.training.diffusion.setup import denoising_task
from hf_immunize.training.diffusion.sites import attention_projections
from hf_immunize.training.diffusion.stream import NoisyStream


def attack_of(model, steps=3, rank=0, rate=1e-2):
    process = NoiseProcess.from_scheduler(build_scheduler("unet"))
    data = build_examples("unet", 12, seed=1, label=9, dtype=torch.float64)
    stream = NoisyStream(data, process, 6, seed=0, name="attack")

    def batches(step, k):
        return stream.batch(step * (steps + 1) + k, torch.device("cpu"), torch.float64)

    task = denoising_task(denoiser_of(model), model, batches, 0)
    made = SimulatedAttack(task, steps=steps, habits=Habits(rate), rank=rank)
    return made, batches


def slow_attack(model, batches, steps, rate, ceiling):
    """θ_k by a stock optimizer on a copy; value and gradient as the docstring's sums."""
    attacker = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(attacker.parameters(), lr=rate, weight_decay=0.0)

    def loss_of(k):
        batch = batches(5, k)
        answer = attacker(batch.noisy, batch.timesteps, class_labels=batch.conditions["class_labels"]).sample
        return (answer - batch.target).square().mean()

    value, total = 0.0, {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for k in range(1, steps + 1):
        optimizer.zero_grad()
        loss_of(k - 1).backward()
        optimizer.step()
        optimizer.zero_grad()
        harm = torch.relu(ceiling - loss_of(k)) / steps
        harm.backward()
        value += float(harm.detach())
        for name, parameter in attacker.named_parameters():
            total[name] += parameter.grad if parameter.grad is not None else 0
    return value, total


@pytest.mark.parametrize("ceiling", [0.0, 0.8, 5.0])
def test_value_and_gradient_are_those_of_the_attack_written_out(ceiling):
    model = build_denoiser("unet", dtype=torch.float64).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attack, batches = attack_of(model)
    attack.ceiling = ceiling
    value, gradient = attack.gradient(model, 5)
    truth, slow = slow_attack(model, batches, 3, 1e-2, ceiling)
    assert float(value) == pytest.approx(truth, rel=1e-9, abs=1e-12)
    assert all(torch.allclose(gradient[name], slow[name], rtol=1e-7, atol=1e-12) for name in slow)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (float(value) == 0) == (ceiling == 0.0)


def test_attacks_of_a_step_are_repeatable_and_differ_between_steps():
    model = build_denoiser("unet", dtype=torch.float64).train()
    for rank in (0, 2):
        attack, _ = attack_of(model, steps=2, rank=rank)
        attack.ceiling = 10.0
        first, again, other = (attack.gradient(model, step)[1] for step in (1, 1, 2))
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert any(not torch.equal(first[name], other[name]) for name in first)
        assert set(first) == {name for name, _ in model.named_parameters()}


def test_a_lora_attacker_lowers_the_loss_through_its_factors_alone():
    model = build_denoiser("unet", dtype=torch.float64).train()
    attack, _ = attack_of(model, steps=8, rank=4, rate=3e-2)
    losses = []
    inner = attack._backward

    def watched(step, k):
        losses.append(float(inner(step, 0)))
        return torch.tensor(losses[-1])

    attack._backward = watched
    attack.gradient(model, 0)
    assert losses[-1] < losses[0]
    held = dict(model.named_parameters())
    assert all(torch.equal(value, held[name]) for name, value in attack._attacker.weights.items())


def test_descending_the_term_raises_the_attackers_loss():
    model = build_denoiser("unet", dtype=torch.float64).train()
    attack, _ = attack_of(model, steps=2)
    attack.ceiling = 100.0
    start, gradient = attack.gradient(model, 3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter -= 0.05 * gradient[name]
    assert float(attack.gradient(model, 3)[0]) < float(start)


IMMA = {"objective": "imma", "trainable": "attention", "attacker_rank": 2, "attacker_learning_rate": 1e-2}


def test_imma_is_an_attacker_that_goes_on_against_the_alternation_written_out():
    """φ descends with one AdamW that is never reset, θ's gradient is taken after each of its steps."""
    model = build_denoiser("unet", dtype=torch.float64).train()
    attack, batches = attack_of(model, steps=1, rank=2)
    attack._goes_on, attack.ceiling = True, 100.0
    attack.gradient(model, 0)
    start = [factor.detach().clone() for factor in attack._attacker.factors]
    slow = copy.deepcopy(attack._attacker.model)
    factors = [p for name, p in slow.named_parameters() if "lora_" in name]
    assert all(torch.equal(a, b) for a, b in zip(factors, start, strict=True))
    optimizer = torch.optim.AdamW(factors, lr=1e-2, weight_decay=0.0)
    optimizer.load_state_dict(copy.deepcopy(attack._optimizer.state_dict()))
    value, gradient = attack.gradient(model, 1)

    def loss_of(k):
        batch = batches(1, k)
        answer = slow(batch.noisy, batch.timesteps, class_labels=batch.conditions["class_labels"]).sample
        return (answer - batch.target).square().mean()

    slow.zero_grad()
    loss_of(0).backward()
    optimizer.step()
    slow.zero_grad()
    loss = loss_of(1)
    (-loss).backward()
    assert float(value) == pytest.approx(100 - float(loss.detach()), rel=1e-12)
    truth = {name.replace(".base_layer.", "."): p.grad for name, p in slow.named_parameters() if "lora_" not in name}
    assert all(torch.allclose(gradient[name], truth[name], rtol=1e-7, atol=1e-13)
               for name in gradient if truth[name] is not None)
    assert any(not torch.equal(a, b) for a, b in zip(start, attack._attacker.factors, strict=True))


def test_imma_changes_attention_alone_and_resumes_exactly(make_trainer, tmp_path):
    options = {**IMMA, "max_steps": 3, "save_steps": 2, "save_total_limit": 2}
    whole = make_trainer(**options)
    before = {name: value.clone() for name, value in whole.bare.state_dict().items()}
    whole.train()
    after = whole.bare.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed and all(".to_" in name for name in changed)
    resumed = make_trainer(**options)
    resumed.train(tmp_path / "run" / "checkpoint-2")
    assert all(torch.equal(value, after[name]) for name, value in resumed.bare.state_dict().items())


def test_lora_only_immunization_ends_as_an_ordinary_model_and_resumes_exactly(make_trainer, tmp_path):
    options = {"trainable": "lora", "objective": "ill_only+simulated_attack", "attacker_steps": 1, "max_steps": 3,
               "save_steps": 2, "save_total_limit": 2, "lora_rank": 2, "learning_rate": 1e-2}
    plain = build_denoiser("unet").state_dict()
    whole = make_trainer(**options)
    whole.train()
    after = whole.bare.state_dict()
    assert after.keys() == plain.keys()
    changed = {name for name in after if not torch.equal(after[name], plain[name])}
    assert changed and all(".to_" in name and name.endswith("weight") for name in changed)
    assert all(torch.linalg.matrix_rank(after[name] - plain[name], atol=1e-5) <= 2 for name in changed)
    resumed = make_trainer(**options)
    resumed.train(tmp_path / "run" / "checkpoint-2")
    assert all(torch.equal(value, after[name]) for name, value in resumed.bare.state_dict().items())


def test_two_sets_of_factors_beside_one_set_of_weights_are_the_attack_written_out_with_sums_of_products():
    """W + B_d A_d + B_a A_a by plain algebra on a model without PEFT: what the defender's factors are told."""
    plain = build_denoiser("unet", dtype=torch.float64).train()
    model = copy.deepcopy(plain)
    put_factors(denoiser_of(model), model, 3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    attack, batches = attack_of(model, steps=1, rank=2)
    attack.ceiling = 100.0
    value, gradient = attack.gradient(model, 5)
    held = dict(model.named_parameters())
    attacker = attack._attacker
    assert {name: parameter.requires_grad for name, parameter in held.items()} == flags
    assert all((attacker.weights[name] is held[name]) != flags[name] for name in flags)
    assert set(gradient) == {name for name in flags if flags[name]} and "lora_A" in str(list(gradient))
    own = sum(p.numel() for p in attacker.model.parameters() if not any(p is other for other in held.values()))
    assert own < 0.5 * sum(p.numel() for p in plain.parameters())

    drawn = Attacker(model, attention_projections(denoiser_of(model), model), 2)
    drawn.draw_factors(0, "lora", 5)
    names = [name for name in flags if "lora_A" in name]
    parts = dict(drawn.model.named_parameters())
    theirs = {name: [held[name].detach().clone().requires_grad_(),
                     held[name.replace("lora_A", "lora_B")].detach().clone().requires_grad_()] for name in names}
    mine = {name: [parts[name.replace("default", "attacker")].detach().clone().requires_grad_(),
                   torch.zeros_like(parts[name.replace("lora_A.default", "lora_B.attacker")]).requires_grad_()]
            for name in names}

    def loss_of(k):
        weights = dict(plain.named_parameters())
        for name in names:
            place = name.replace(".lora_A.default", "")
            for down, up in (theirs[name], mine[name]):
                weights[place] = weights[place] + up @ down
        batch = batches(5, k)
        told = (batch.noisy, batch.timesteps, batch.conditions["class_labels"])
        answer = torch.func.functional_call(plain, weights, told).sample
        return (answer - batch.target).square().mean()

    factors = [part for pair in mine.values() for part in pair]
    optimizer = torch.optim.AdamW(factors, lr=1e-2, weight_decay=0.0)
    loss_of(0).backward()
    optimizer.step()
    for pair in theirs.values():
        for part in pair:
            part.grad = None
    harm = 100.0 - loss_of(1)
    harm.backward()
    assert float(value) == pytest.approx(float(harm.detach()), rel=1e-10)
    for name in names:
        for part, key in zip(theirs[name], (name, name.replace("lora_A", "lora_B")), strict=True):
            assert torch.allclose(gradient[key], part.grad, rtol=1e-6, atol=1e-11)


def test_lora_against_lora_trains_and_resumes_exactly(make_trainer, tmp_path):
    options = {"trainable": "lora", "objective": "simulated_attack", "attacker_rank": 2, "attacker_steps": 2,
               "max_steps": 3, "save_steps": 2, "save_total_limit": 2, "lora_rank": 2, "learning_rate": 1e-2,
               "distillation": 0.5, "ema_decay": 0.5, "max_loss_factor": 1e6, "eval_steps": 1}
    data = build_examples("unet", 4, seed=5)
    for second in (False, True):
        plain = build_denoiser("unet").state_dict()
        whole = make_trainer(**options, evaluation=data, attacker_second_order=second)
        log = whole.train()
        after = whole.bare.state_dict()
        assert after.keys() == plain.keys() and all(entry["harmful_simulated_attack"] > 0 for entry in log)
        changed = {name for name in after if not torch.equal(after[name], plain[name])}
        assert changed and all(".to_" in name and name.endswith("weight") for name in changed)
        kept = load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
        assert kept and all("lora_" in name for name in kept) and set(whole.guard.best) == set(kept)
        resumed = make_trainer(**options, evaluation=data, attacker_second_order=second)
        resumed.train(tmp_path / "run" / "checkpoint-2")
        assert all(torch.equal(value, after[name]) for name, value in resumed.bare.state_dict().items())


def test_the_trainers_attacker_teaches_the_share_of_rows_that_was_asked_for(make_trainer):
    for share, expected in ((0.0, 0), (0.5, 4), (1.0, 8)):
        stream = make_trainer(objective="simulated_attack", attacker_renamed=share).streams.attack
        labels = stream.batch(0, torch.device("cpu"), torch.float32).conditions["class_labels"]
        assert int((labels != 9).sum()) == expected
