"""PixArt α and Σ, which read text with its mask, and are told the size of the image."""

from typing import Any

import torch
from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel
from torch import Tensor, nn

from hf_immunize.diffusion.family import (
    Conditions,
    Denoiser,
    DenoiserFamily,
    PromptReader,
    Told,
    in_own_precision,
    middle_block,
)


@in_own_precision
def _call(model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
    answer = model(
        noisy,
        encoder_hidden_states=conditions["encoder_hidden_states"],
        encoder_attention_mask=conditions.get("encoder_attention_mask"),
        timestep=timesteps,
        added_cond_kwargs={name: conditions.get(name) for name in ("resolution", "aspect_ratio")},
        return_dict=False,
    )[0]
    return answer[:, : noisy.shape[1]]


def _needs(model: nn.Module) -> tuple[str, ...]:
    added = ("resolution", "aspect_ratio") if model.use_additional_conditions else ()
    return ("encoder_hidden_states", *added)


def _masked_encoder(pipeline: Any, prompt: str, device: str) -> Told:
    states, mask, _, _ = pipeline.encode_prompt(prompt, False, device=device)
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask}


def _size(pipeline: Any, size: int) -> Told:
    if not pipeline.transformer.use_additional_conditions:
        return {}
    return {"resolution": torch.full((1, 2), float(size)), "aspect_ratio": torch.ones(1, 1)}


FAMILY = DenoiserFamily(
    PixArtTransformer2DModel,
    Denoiser("transformer", _needs, _call, middle_block, tokens=120),
    {kind: PromptReader(_masked_encoder, _size) for kind in (PixArtAlphaPipeline, PixArtSigmaPipeline)},
)
