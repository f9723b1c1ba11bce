"""Noise, targets and weights against diffusers' own schedulers and against solving for x₀ by hand."""

from __future__ import annotations

import math

import diffusers
import pytest
import torch
from diffusers.training_utils import compute_snr
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_immunize.diffusion import NoiseProcess, denoising_losses
from hf_immunize.errors import ConfigError

KINDS = ("epsilon", "v_prediction", "sample")


def ddpm(kind: str, **options):
    return diffusers.DDPMScheduler(num_train_timesteps=1000, prediction_type=kind, **options)


def rows(count: int = 6, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    clean, noise = torch.randn(2, count, 2, 4, 4, generator=generator, dtype=torch.float64)
    return clean, noise, torch.randint(0, 1000, (count,), generator=generator)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_noise_and_target_are_those_of_the_scheduler(kind, schedule):
    scheduler = ddpm(kind, beta_schedule=schedule)
    process = NoiseProcess.from_scheduler(scheduler)
    clean, noise, levels = rows()
    told = process.timesteps(levels)
    assert torch.equal(told, levels)
    truth = scheduler.add_noise(clean, noise, told)
    assert torch.allclose(process.noisy(clean, noise, levels), truth, atol=1e-6)
    wanted = {"epsilon": noise, "sample": clean, "v_prediction": scheduler.get_velocity(clean, noise, told)}[kind]
    assert torch.allclose(process.target(clean, noise, levels), wanted, atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_is_the_straight_line_of_the_scheduler(shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    process = NoiseProcess.from_scheduler(scheduler)
    clean, noise, levels = rows()
    told = process.timesteps(levels)
    for row, level in enumerate(levels.tolist()):
        sigma = scheduler.sigmas[999 - level].double()  # the scheduler starts at the noisiest
        assert float(told[row]) == pytest.approx(float(scheduler.timesteps[999 - level]), rel=1e-5)
        line = (1 - sigma) * clean[row] + sigma * noise[row]
        assert torch.allclose(process.noisy(clean, noise, levels)[row], line, atol=1e-6)
        step = 1e-6
        moved = (1 - sigma - step) * clean[row] + (sigma + step) * noise[row]
        assert torch.allclose(process.target(clean, noise, levels)[row], (moved - line) / step, atol=1e-6)


def solved_for_clean(kind: str, answer: float, noisy: float, signal: float, noise: float) -> float:
    """x₀ from the answer and x_i, by substituting each definition."""
    if kind == "epsilon":
        return (noisy - noise * answer) / signal
    if kind == "v_prediction":
        return signal * noisy - noise * answer
    return noisy - noise * answer if kind == "flow" else answer


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from([*KINDS, "flow"]),
    level=st.integers(0, 999),
    gamma=st.floats(0.1, 20),
    clean=st.floats(-2, 2),
    noise=st.floats(-2, 2),
    error=st.floats(0.1, 2),
)
def test_min_snr_weights_the_error_in_the_clean_image(kind, level, gamma, clean, noise, error):
    process = NoiseProcess.from_scheduler(
        diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0) if kind == "flow" else ddpm(kind)
    )
    levels = torch.tensor([level])
    s, n = float(process.signal_T[level]), float(process.noise_T[level])
    if s < 1e-6:
        return
    start, seen = (torch.full((1, 1, 1, 1), value, dtype=torch.float64) for value in (clean, noise))
    noisy, target = float(process.noisy(start, seen, levels)), float(process.target(start, seen, levels))
    wrong = solved_for_clean(kind, target + error, noisy, s, n)
    assert solved_for_clean(kind, target, noisy, s, n) == pytest.approx(clean, abs=1e-6)
    wanted = min((s / n) ** 2, gamma) * (wrong - clean) ** 2
    found = float(process.min_snr_weight(levels, gamma)) * error**2
    assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("kind,extra", [("epsilon", 0.0), ("v_prediction", 1.0)])
def test_min_snr_is_what_the_training_scripts_of_diffusers_use(kind, extra):
    scheduler, levels = ddpm(kind), torch.arange(0, 1000, 37)
    snr = compute_snr(scheduler, levels)
    truth = torch.stack([snr, torch.full_like(snr, 5.0)], dim=1).min(dim=1)[0] / (snr + extra)
    assert torch.allclose(NoiseProcess.from_scheduler(scheduler).min_snr_weight(levels, 5.0).float(), truth, rtol=1e-3)


def test_a_level_without_signal_has_a_finite_weight():
    process = NoiseProcess.from_scheduler(ddpm("epsilon", rescale_betas_zero_snr=True))
    assert float(process.signal_T[-1]) < 1e-6
    assert float(process.min_snr_weight(torch.tensor([999]), 5.0)) == 1.0


def test_levels_are_uniform_within_the_range_or_logit_normal():
    process = NoiseProcess.from_scheduler(ddpm("epsilon"))
    drawn = process.draw_levels(20_000, torch.Generator().manual_seed(0), low=0.25, high=0.5)
    assert int(drawn.min()) == 250 and int(drawn.max()) == 499
    assert float(drawn.double().mean()) == pytest.approx(374.5, abs=2)
    logits = process.draw_levels(20_000, torch.Generator().manual_seed(0), logit_normal=True).double()
    inside = ((logits > 1000 / (1 + math.e)) & (logits < 1000 / (1 + math.exp(-1)))).double().mean()
    assert float(inside) == pytest.approx(0.6827, abs=0.01)
    with pytest.raises(ConfigError, match="range of noise levels"):
        process.draw_levels(2, torch.Generator(), low=0.5, high=0.5)


def test_schedulers_without_a_known_prediction_type_are_refused():
    scheduler = ddpm("epsilon")
    scheduler.register_to_config(prediction_type="x0")
    with pytest.raises(ConfigError, match="got DDPMScheduler with prediction_type 'x0'"):
        NoiseProcess.from_scheduler(scheduler)
    with pytest.raises(ConfigError, match="expected a scheduler with alphas_cumprod"):
        NoiseProcess.from_scheduler(diffusers.EDMEulerScheduler())


def test_losses_are_means_over_a_row():
    answer, target = torch.zeros(2, 1, 2, 2), torch.tensor([1.0, 2.0])[:, None, None, None].expand(2, 1, 2, 2)
    assert denoising_losses(answer, target).tolist() == [1.0, 4.0]
