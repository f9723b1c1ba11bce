"""Drawing with the schedulers that published pipelines have."""

from __future__ import annotations

import diffusers
import pytest
import torch
from denoiser_builders import build_denoiser, build_examples

from hf_immunize.diffusion import denoiser_of
from hf_immunize.diffusion.drawing import draw_latents

FLUX = {
    "shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}


def drawn(family, scheduler):
    model = build_denoiser(family)
    conditions = build_examples(family, 2).conditions
    channels = build_examples(family, 1).latents.shape[1]
    return draw_latents(denoiser_of(model), model, scheduler, conditions, (2, channels, 8, 8), steps=3)


def test_flux_draws_with_a_shift_that_depends_on_the_size():
    found = drawn("flux", diffusers.FlowMatchEulerDiscreteScheduler(**FLUX))
    static = drawn("flux", diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert torch.isfinite(found).all() and not torch.equal(found, static)


@pytest.mark.parametrize("kind", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "PNDMScheduler"])
def test_latents_are_not_clipped_unless_the_scheduler_says_so(kind):
    assert float(drawn("sd", getattr(diffusers, kind)()).abs().max()) > 1
    assert float(drawn("sd", diffusers.DDPMScheduler(clip_sample=True)).abs().max()) <= 1
