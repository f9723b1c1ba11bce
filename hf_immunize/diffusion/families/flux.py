"""Flux, whose tokens are patches of 2×2 latents."""

from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn

from hf_immunize.diffusion.family import (
    JOINT,
    Conditions,
    Denoiser,
    DenoiserFamily,
    PromptReader,
    Told,
    bare,
    exact,
    in_own_precision,
    middle_block,
    pooled_text,
)

FLUX_GUIDANCE = 3.5
"""Guidance that a distilled Flux is told during training, unless the conditions hold ``guidance``."""


@in_own_precision
def _call(model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
    rows, _, height, width = noisy.shape
    text = conditions["encoder_hidden_states"]
    guidance = None
    config: Any = bare(model).config
    if config.guidance_embeds:
        guidance = conditions.get("guidance", torch.full((rows,), FLUX_GUIDANCE)).to(exact(noisy))
    answer = model(
        hidden_states=pack_patches(noisy),
        encoder_hidden_states=text,
        pooled_projections=conditions["pooled_projections"],
        timestep=timesteps.to(exact(noisy)) / 1000,  # the model multiplies by 1000 itself
        img_ids=patch_places(height // 2, width // 2).to(exact(noisy)),
        txt_ids=torch.zeros(text.shape[1], 3).to(exact(noisy)),
        guidance=guidance,
        return_dict=False,
    )[0]
    return unpack_patches(answer, height, width)


def pack_patches(latents: Tensor) -> Tensor:
    """N×C×H×W as N×(HW/4)×4C: each 2×2 patch becomes one token (Flux)."""
    rows, channels, height, width = latents.shape
    patches = latents.reshape(rows, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(rows, height * width // 4, 4 * channels)


def unpack_patches(tokens: Tensor, height: int, width: int) -> Tensor:
    """Inverse of ``pack_patches``."""
    rows, _, depth = tokens.shape
    patches = tokens.reshape(rows, height // 2, width // 2, depth // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(rows, depth // 4, height, width)


def patch_places(height: int, width: int) -> Tensor:
    """(0, row, column) of each token, as Flux's rotary embedding wants it."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)


def _two_encoders(pipeline: Any, prompt: str, device: str) -> Told:
    states, pooled, _ = pipeline.encode_prompt(prompt, None, device=device)
    return {"encoder_hidden_states": states, "pooled_projections": pooled}


FAMILY = DenoiserFamily(
    FluxTransformer2DModel,
    Denoiser(
        "transformer", pooled_text, _call, middle_block, JOINT, tokens=512,
        channels=lambda model: model.config.in_channels // 4,
        side=lambda _: 128,  # its config names none; 1024 pixels
    ),
    {FluxPipeline: PromptReader(_two_encoders)},
)  # fmt: skip
