"""DiT, told a class of ImageNet by name or number."""

from typing import Any

import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
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
from hf_immunize.errors import DataError


@in_own_precision
def _call(model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
    answer = model(noisy, timestep=timesteps, class_labels=conditions["class_labels"], return_dict=False)[0]
    return answer[:, : noisy.shape[1]]  # the second half, where there is one, is a learned variance


def _class_name(pipeline: Any, prompt: str, device: str) -> Told:
    known = pipeline.labels
    if prompt not in known and not prompt.isdecimal():
        raise DataError(
            f"expected the name or the number of a class of this pipeline as prompt, got {prompt!r}: names are "
            f"{sorted(known)[:10]} and so on, see pipeline.labels."
        )
    return {"class_labels": torch.tensor([known.get(prompt, int(prompt) if prompt.isdecimal() else 0)], device=device)}


FAMILY = DenoiserFamily(
    DiTTransformer2DModel,
    Denoiser(
        "transformer", lambda _: ("class_labels",), _call, middle_block,
        classes=lambda model: model.config.num_embeds_ada_norm,
    ),
    {DiTPipeline: PromptReader(_class_name)},
)  # fmt: skip
