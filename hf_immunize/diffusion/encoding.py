"""Folders of images with a prompt as examples of a text-conditional pipeline: encoded once by its own VAE and encoders.

Images that are not RGB are converted; the shorter side is resized, the middle cropped. Nothing is augmented.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image, ImageOps
from torch import Tensor

from hf_immunize.diffusion.denoisers import denoiser_of
from hf_immunize.diffusion.examples import LatentDataset
from hf_immunize.diffusion.pipelines import component_of
from hf_immunize.errors import DataError, ModelError

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass
class PromptArguments:
    """What a text-to-image model keeps, and which concept it shall not learn: folders of images, each with a prompt."""

    retain_images: str = field(metadata={"help": "Folder of images the model draws and must keep."})
    harmful_images: str = field(metadata={"help": "Folder of images of the concept it shall not learn."})
    retain_prompt: str = field(metadata={"help": "Prompt of the retained images."})
    harmful_prompt: str = field(metadata={"help": "Prompt of the concept, e.g. 'a photo of sks person'."})
    resolution: int = field(default=512, metadata={"help": "Side of the images in pixels, a multiple of 16."})


def read_pixels(folder: str | Path, resolution: int) -> Tensor:
    """Every image of a folder as N×3×R×R in −1..1, by name. Raises DataError for none, or one that cannot be read."""
    names = sorted(path for path in Path(folder).glob("*") if path.suffix.lower() in _SUFFIXES)
    if not names:
        raise DataError(f"expected images ({', '.join(_SUFFIXES)}) in {Path(folder).name!r}, got none: check the path.")
    rows = []
    for path in names:
        try:
            with Image.open(path) as opened:
                image = ImageOps.fit(ImageOps.exif_transpose(opened).convert("RGB"), (resolution, resolution))
        except (OSError, ValueError) as error:
            raise DataError(f"expected a readable image, got {path.name!r}: {error}: remove or replace it.") from error
        rows.append(torch.from_numpy(np.asarray(image).astype(np.float32) / 127.5 - 1).permute(2, 0, 1))
    return torch.stack(rows)


def _one_encoder(pipeline: Any, prompt: str, size: int) -> dict[str, Tensor]:
    return {"encoder_hidden_states": pipeline.encode_prompt(prompt, "cpu", 1, False)[0]}


def _two_encoders(pipeline: Any, prompt: str, size: int) -> dict[str, Tensor]:
    states, _, pooled, _ = pipeline.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
    # original size, crop and target size (Podell et al. 2023, section 2.2): nothing was cropped away
    times = torch.tensor([[size, size, 0, 0, size, size]], dtype=states.dtype)
    return {"encoder_hidden_states": states, "text_embeds": pooled, "time_ids": times}


def _three_encoders(pipeline: Any, prompt: str, size: int) -> dict[str, Tensor]:
    states, _, pooled, _ = pipeline.encode_prompt(prompt, None, None, device="cpu", do_classifier_free_guidance=False)
    return {"encoder_hidden_states": states, "pooled_projections": pooled}


def _flux_encoders(pipeline: Any, prompt: str, size: int) -> dict[str, Tensor]:
    states, pooled, _ = pipeline.encode_prompt(prompt, None, device="cpu")
    return {"encoder_hidden_states": states, "pooled_projections": pooled}


PROMPT_ENCODERS: dict[type, Callable[[Any, str, int], dict[str, Tensor]]] = {
    StableDiffusionPipeline: _one_encoder,
    StableDiffusionXLPipeline: _two_encoders,
    StableDiffusion3Pipeline: _three_encoders,
    FluxPipeline: _flux_encoders,
}


@torch.no_grad()
def encode(pipeline: Any, pixels: Tensor, prompt: str, label: int, names: Sequence[str]) -> LatentDataset:
    """Latents of every image and the prompt's conditions, as rows of one concept.

    Raises:
        ModelError: a pipeline class that is not in ``PROMPT_ENCODERS``, or one without a VAE.
        DataError: no prompt, a resolution the VAE cannot halve often enough, or a VAE that does not fit the denoiser.
    """
    encoder, vae = PROMPT_ENCODERS.get(type(pipeline)), getattr(pipeline, "vae", None)
    if encoder is None or vae is None:
        known = sorted(kind.__name__ for kind in PROMPT_ENCODERS)
        raise ModelError(f"expected a pipeline among {known} with a VAE, got {type(pipeline).__name__}.")
    if not prompt.strip():
        raise DataError(f"expected a prompt for the images of {names[label]!r}, got none: give retain_prompt and "
                        "harmful_prompt.")
    size, step = pixels.shape[-1], 2 * pipeline.vae_scale_factor
    if size % step:
        raise DataError(f"expected images whose side is a multiple of {step}, got {size}: set resolution.")
    config, shift = vae.config, getattr(vae.config, "shift_factor", None) or 0.0
    parts = [vae.encode(part.to(vae.dtype)).latent_dist.mode() for part in pixels.split(4)]
    latents = (torch.cat(parts) - shift) * config.scaling_factor
    model = getattr(pipeline, component_of(pipeline))
    one = encoder(pipeline, prompt, size)
    # Encoders keep the dtype of their file, bf16 say; examples are float32, whatever the run's precision.
    conditions = {name: value.float().expand(len(latents), *value.shape[1:]).clone() for name, value in one.items()}
    denoiser_of(model).check(model, latents, conditions)
    labels = torch.full((len(latents),), label)
    return LatentDataset(latents.float(), conditions, labels, list(names), names[label])
