"""Stable Diffusion 3, which attends to image and text together."""

from typing import Any

from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn

from hf_immunize.diffusion.family import (
    JOINT,
    Conditions,
    Denoiser,
    DenoiserFamily,
    PromptReader,
    Told,
    exact,
    in_own_precision,
    middle_block,
    pooled_text,
)


@in_own_precision
def _call(model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
    return model(
        hidden_states=noisy,
        encoder_hidden_states=conditions["encoder_hidden_states"],
        pooled_projections=conditions["pooled_projections"],
        timestep=timesteps.to(exact(noisy)),
        return_dict=False,
    )[0]


def _three_encoders(pipeline: Any, prompt: str, device: str) -> Told:
    states, _, pooled, _ = pipeline.encode_prompt(prompt, None, None, device=device, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": states, "pooled_projections": pooled}


FAMILY = DenoiserFamily(
    SD3Transformer2DModel,
    Denoiser("transformer", pooled_text, _call, middle_block, JOINT, tokens=333),
    {StableDiffusion3Pipeline: PromptReader(_three_encoders)},
)
