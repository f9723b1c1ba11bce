"""UNets that read text: Stable Diffusion 1 and 2, and XL."""

from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn

from hf_immunize.diffusion.family import (
    Conditions,
    Denoiser,
    DenoiserFamily,
    PromptReader,
    Told,
    class_count,
    class_labels,
    in_own_precision,
)


@in_own_precision
def _call(model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
    added = {name: conditions[name] for name in ("text_embeds", "time_ids") if name in conditions}
    return model(
        noisy,
        timesteps,
        encoder_hidden_states=conditions["encoder_hidden_states"],
        encoder_attention_mask=conditions.get("encoder_attention_mask"),
        class_labels=conditions.get("class_labels"),
        added_cond_kwargs=added or None,
        return_dict=False,
    )[0]


def _needs(model: nn.Module) -> tuple[str, ...]:
    config: Any = model.config
    added = ("text_embeds", "time_ids") if config.addition_embed_type == "text_time" else ()
    return ("encoder_hidden_states", *added, *class_labels(model))


def _one_encoder(pipeline: Any, prompt: str, device: str) -> Told:
    return {"encoder_hidden_states": pipeline.encode_prompt(prompt, device, 1, False)[0]}


def _two_encoders(pipeline: Any, prompt: str, device: str) -> Told:
    states, _, pooled, _ = pipeline.encode_prompt(prompt, device=device, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": states, "text_embeds": pooled}


def _size(pipeline: Any, size: int) -> Told:
    # original size, crop and target size (Podell et al. 2023, section 2.2): nothing was cropped away
    return {"time_ids": torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.float32)}


FAMILY = DenoiserFamily(
    UNet2DConditionModel,
    Denoiser("unet", _needs, _call, lambda _: "mid_block", classes=class_count),
    {
        StableDiffusionPipeline: PromptReader(_one_encoder),
        StableDiffusionXLPipeline: PromptReader(_two_encoders, _size),
    },
)
