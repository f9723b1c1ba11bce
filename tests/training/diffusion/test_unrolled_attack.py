"""The exact gradient of the simulated attack against finite differences and against autograd through every step."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from denoiser_builders import FAMILIES, build_denoiser, build_examples, build_scheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_immunize.diffusion import NoiseProcess, denoiser_of
from hf_immunize.errors import ConfigError, ModelError
from hf_immunize.training.core import distributed, unrolled
from hf_immunize.training.core.habits import Habits
from hf_immunize.training.core.simulated import SimulatedAttack
from hf_immunize.training.core.unrolled import UnrolledAttack, opaque_operations
from hf_immunize.training.diffusion.setup import denoising_task
from hf_immunize.training.diffusion.stream import NoisyStream

SECOND = {"objective": "simulated_attack", "attacker_second_order": True, "attacker_steps": 2}


def attack_of(model, family="unet", kind=UnrolledAttack, steps=3, rank=0, rate=1e-3, ceiling=10.0,
              dtype=torch.float64, device="cpu"):
    process = NoiseProcess.from_scheduler(build_scheduler(family))
    data = build_examples(family, 12, seed=1, label=9, dtype=dtype)
    stream = NoisyStream(data, process, 6, seed=0, name="attack")

    def batches(step, k):
        return stream.batch(step * (steps + 1) + k, torch.device(device), dtype)

    made = kind(denoising_task(denoiser_of(model), model, batches, 0), steps=steps, habits=Habits(rate), rank=rank)
    made.ceiling = ceiling
    return made, batches


def inner(gradient, direction):
    return sum(float((gradient[name] * direction[name]).sum()) for name in direction)


def slope(attack, model, direction, step=1e-6):
    """dH along a direction of weights, by central differences."""
    values = []
    for sign in (1, -2):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter += sign * step * direction[name]
        values.append(float(attack.gradient(model, 5)[0]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += step * direction[name]
    return (values[0] - values[1]) / (2 * step)


@pytest.mark.parametrize("kind,calls", [(SimulatedAttack, 4), (UnrolledAttack, 10)])
def test_ranks_exchange_one_sum_for_each_gradient(monkeypatch, kind, calls):
    """Three steps of the attacker and the gradient after them; going back, each step has its own and a pull-back."""
    model = build_denoiser("unet").double()
    attack, _ = attack_of(model, kind=kind)
    value, gradient = attack.gradient(model, 5)
    seen = []

    def all_reduce(flat):  # another rank has the same rows
        seen.append(flat.numel())
        flat *= 2

    monkeypatch.setattr(distributed, "world", lambda: (0, 2))
    monkeypatch.setattr(distributed.dist, "all_reduce", all_reduce)
    again, same = attack.gradient(model, 5)
    assert len(seen) == calls and min(seen) >= sum(part.numel() for part in gradient.values())
    assert float(again) == pytest.approx(float(value), rel=1e-12)
    assert all(torch.allclose(same[name], held, rtol=1e-12, atol=1e-15) for name, held in gradient.items())


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_gradient_is_that_of_finite_differences_in_every_family(family, rank):
    model = build_denoiser(family, dtype=torch.float64).train()
    attack, _ = attack_of(model, family, rank=rank)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _, gradient = attack.gradient(model, 5)
    assert gradient.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.manual_seed(1)
    direction = {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}
    assert inner(gradient, direction) == pytest.approx(slope(attack, model, direction), rel=1e-4)


def whole_graph(model, batches, steps, rate, ceiling):
    """H with every step of the attacker kept in one autograd graph."""
    start = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    moved, value = start, 0.0

    def loss_at(weights, k):
        batch = batches(5, k)
        given = (batch.noisy, batch.timesteps)
        answer = torch.func.functional_call(model, weights, given, {"class_labels": batch.conditions["class_labels"]})
        return (answer.sample - batch.target).square().mean()

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for k in range(steps):
            parts = torch.autograd.grad(loss_at(moved, k), list(moved.values()), create_graph=True)
            moved = {name: old - rate * part / (part.abs() + part.square().mean().sqrt())
                     for (name, old), part in zip(moved.items(), parts, strict=True)}
            value = value + torch.relu(ceiling - loss_at(moved, k + 1)) / steps
        gradient = torch.autograd.grad(value, list(start.values()), materialize_grads=True)
    return float(value.detach()), dict(zip(start, gradient, strict=True))


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 3), steps=st.integers(1, 4), rate=st.sampled_from([1e-5, 1e-3, 3e-2]),
    ceiling=st.sampled_from([0.0, 0.9, 1.05, 30.0]),
)
@pytest.mark.slow
def test_value_and_gradient_are_those_of_autograd_through_all_steps(seed, steps, rate, ceiling):
    model = build_denoiser("unet", seed=seed, dtype=torch.float64).train()
    attack, batches = attack_of(model, steps=steps, rate=rate, ceiling=ceiling)
    value, gradient = attack.gradient(model, 5)
    truth, slow = whole_graph(model, batches, steps, rate, ceiling)
    assert float(value) == pytest.approx(truth, rel=1e-9, abs=1e-12)
    scale = max(float(part.abs().max()) for part in slow.values())
    for name in slow:
        assert torch.allclose(gradient[name], slow[name], rtol=1e-6, atol=1e-8 * scale), name
    assert (scale == 0) == (float(value) == 0)


def test_without_steps_of_any_size_it_is_the_first_order_gradient():
    model = build_denoiser("unet", dtype=torch.float64).train()
    found = [
        attack_of(model, kind=kind, rate=1e-12)[0].gradient(model, 5)[1] for kind in (UnrolledAttack, SimulatedAttack)
    ]
    for name in found[0]:
        assert torch.allclose(found[0][name], found[1][name], rtol=1e-5, atol=1e-7), name


def test_with_steps_of_some_size_the_first_order_gradient_is_another_one():
    """Else the test above would say nothing about curvature."""
    model = build_denoiser("unet", dtype=torch.float64).train()
    exact, first = (
        attack_of(model, kind=kind, rate=1e-2)[0].gradient(model, 5)[1] for kind in (UnrolledAttack, SimulatedAttack)
    )
    flat = [torch.cat([part.flatten() for part in found.values()]) for found in (exact, first)]
    assert torch.nn.functional.cosine_similarity(*flat, dim=0) < 0.9


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), st.integers(0, 10**6), st.floats(-12, 6), st.booleans())
def test_a_step_and_its_derivative_are_those_of_the_formula(count, seed, scale, with_zero):
    """Against sums over entries in plain Python, and autograd through them."""
    generator = torch.Generator().manual_seed(seed)
    g, a = (torch.randn(count, generator=generator, dtype=torch.float64) for _ in range(2))
    g = g * 10**scale
    if with_zero and count > 1:
        g[0] = 0
    signs = g.sign()
    g.requires_grad_()
    s = torch.sqrt(sum(part * part for part in g) / count)
    slow = torch.stack([0.3 * part / (sign * part + s) for part, sign in zip(g, signs, strict=True)])
    assert torch.allclose(unrolled.update(g.detach(), 0.3), slow, rtol=1e-12)
    assert float(slow.detach().abs().max()) < 0.3
    (truth,) = torch.autograd.grad(slow, g, a)
    found = unrolled.update_vjp(g.detach(), a, 0.3)
    assert torch.allclose(found * 10**scale, truth * 10**scale, rtol=1e-9, atol=1e-12)


def test_a_gradient_of_zeros_moves_nothing():
    zeros, ones = torch.zeros(3), torch.ones(3)
    assert torch.equal(unrolled.update(zeros, 0.1), zeros)
    assert torch.equal(unrolled.update_vjp(zeros, ones, 0.1), zeros)


def test_its_attacker_gains_most_of_what_adamw_gains():
    """Else the defender would train against an attack that is none."""
    model = build_denoiser("unet", dtype=torch.float64).train()
    harm = {}
    for kind in (UnrolledAttack, SimulatedAttack):
        attack, batches = attack_of(model, kind=kind, steps=4, rate=3e-3)
        attack._batches = lambda step, k, batches=batches: batches(step, 0)
        harm[kind] = float(attack.gradient(model, 5)[0])
    with torch.no_grad():
        batch = batches(5, 0)
        before = float((model(batch.noisy, batch.timesteps, batch.conditions["class_labels"]).sample - batch.target)
                       .square().mean())
    gained = {kind: before - (10 - value) for kind, value in harm.items()}
    assert gained[SimulatedAttack] > 0
    assert gained[UnrolledAttack] > 0.6 * gained[SimulatedAttack]


@pytest.mark.parametrize("size", [1e-12, 1e-17, 1e-21, 1e-30, 1e-40])
def test_small_gradients_give_finite_numbers_in_float32(size):
    """Keys' biases have a gradient that is rounding noise; one NaN would spoil the gradient of every weight."""
    g, a = torch.tensor([1.0, -3.0, 0.0]), torch.tensor([1.0, 0.5, 2.0])
    moved, pulled = unrolled.update(g * size, 0.1), unrolled.update_vjp(g * size, a, 0.1)
    if size > 1e-18:
        assert torch.allclose(moved, unrolled.update(g, 0.1), rtol=1e-5)
        assert torch.allclose(pulled * size, unrolled.update_vjp(g, a, 0.1), rtol=1e-4, atol=1e-7)
    else:
        assert not moved.any() and not pulled.any()


def test_fused_attention_is_refused_rather_than_differentiated(monkeypatch):
    """The kernel PyTorch would choose on its own is named; on the math kernel there is nothing to refuse."""
    model = build_denoiser("unet", dtype=torch.float64).train()
    monkeypatch.setattr(unrolled, "sdpa_kernel", lambda backend: contextlib.nullcontext())
    with pytest.raises(ModelError, match="ScaledDotProduct.*reset_attention_backend"):
        attack_of(model)[0].gradient(model, 5)


class Twice(torch.autograd.Function):
    """An operation whose backward has no graph: its second derivative would silently be zero."""

    @staticmethod
    def forward(ctx, x):
        ctx.x = x.detach()
        return x.square()

    @staticmethod
    def backward(ctx, gradient):
        return 2 * ctx.x * gradient.detach()


def test_operations_that_autograd_cannot_look_into_are_named():
    x = torch.ones(3, requires_grad=True)
    assert opaque_operations((x.exp() + Twice.apply(x)).sum()) == {"TwiceBackward"}
    assert opaque_operations((x.exp() @ x).relu()) == set()

    model = build_denoiser("unet", dtype=torch.float64).train()
    inside = model.mid_block.attentions[0].to_q
    inside.register_forward_hook(lambda module, inputs, output: Twice.apply(output))
    with pytest.raises(ModelError, match="TwiceBackward"):
        attack_of(model)[0].gradient(model, 5)


def gradients_of(trainer):
    trainer._measure_base()
    trainer.compute_gradients()
    return {name: p.grad.clone() for name, p in trainer.bare.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_and_dropout_change_nothing(make_trainer):
    model = build_denoiser("unet", dtype=torch.float64)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    plain, saved = (
        gradients_of(make_trainer(model=copy.deepcopy(model), dtype=torch.float64, gradient_checkpointing=on, **SECOND))
        for on in (False, True)
    )
    for name, truth in plain.items():
        assert torch.allclose(saved[name], truth, rtol=1e-7, atol=1e-10), name


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"attacker_rank": 2}, {"trainable": "attention"}, {"trainable": "lora"}])
def test_runs_resume_exactly(make_trainer, tmp_path, options):
    options = {**SECOND, "max_steps": 3, "save_steps": 2, "save_total_limit": 2, **options}
    whole = make_trainer(**options)
    log = whole.train()
    assert all(entry["harmful_simulated_attack"] > 0 for entry in log)
    resumed = make_trainer(**options)
    resumed.train(tmp_path / "run" / "checkpoint-2")
    after = whole.bare.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in resumed.bare.state_dict().items())


@pytest.mark.parametrize("kind", [SimulatedAttack, UnrolledAttack])
def test_the_attackers_steps_count_under_mixed_precision(kind):
    """Autocast keeps casts of weights; those of before the attacker's step would hide it."""
    model = build_denoiser("unet").train()
    found = []
    for half in (False, True):
        attack, _ = attack_of(model, kind=kind, rate=1e-2, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            value, gradient = attack.gradient(model, 5)
        found.append((10 - float(value), torch.cat([part.flatten() for part in gradient.values()])))
    (full, exact), (half, rounded) = found
    _, batches = attack_of(model, kind=kind, dtype=torch.float32)
    start = sum(float((model(b.noisy, b.timesteps, b.conditions["class_labels"]).sample - b.target).square().mean())
                for b in (batches(5, k) for k in (1, 2, 3))) / 3
    assert start - full > 0.1
    assert start - half == pytest.approx(start - full, rel=0.1)
    assert torch.nn.functional.cosine_similarity(exact, rounded, dim=0) > 0.9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, torch sees none")
@pytest.mark.parametrize("family", ["unet", "sd3"])
def test_on_a_cuda_device_in_float32_it_is_that_of_the_cpu_in_float64(family):
    found = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        model = build_denoiser(family, dtype=dtype).to(device).train()
        attack, _ = attack_of(model, family, dtype=dtype, device=device)
        gradient = attack.gradient(model, 5)[1]
        found.append(torch.cat([part.flatten().double().cpu() for part in gradient.values()]))
    assert float((found[1] - found[0]).norm() / found[0].norm()) <= 0.02


def test_it_is_off_by_default_and_only_for_the_simulated_attack(make_trainer):
    def attack(**options):
        return make_trainer(**options).terms.weight_terms.objectives["harmful_simulated_attack"]

    assert type(attack(objective="simulated_attack")) is SimulatedAttack
    assert type(attack(**SECOND)) is UnrolledAttack
    for objective in ("condition_number", "imma"):
        with pytest.raises(ConfigError, match="attacker_second_order"):
            make_trainer(objective=objective, attacker_second_order=True, trainable="attention", attacker_rank=2)
