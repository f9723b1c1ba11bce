"""Images that a denoiser draws, the same for equal weights: seeded noise, a sampler without noise of its own.

Shape legend: N rows, C×H×W latents or pixels.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from PIL import Image
from torch import Tensor, nn

from hf_immunize.diffusion.family import Conditions, Denoiser, dtype_of_rows
from hf_immunize.diffusion.noise import NoiseProcess
from hf_immunize.errors import RecordError

DRAW_BATCH_SIZE, _GAP = 128, 2

DRAWN_SHARES = (0.1, 0.3, 1.0)
"""Parts of an attack's budget after which the attacked model draws: one line of its picture each."""


def drawing_steps(budget: int) -> list[int]:
    """The steps of ``DRAWN_SHARES``, rising, none twice."""
    return sorted({max(1, round(share * budget)) for share in DRAWN_SHARES})


def sampler_of(scheduler: Any) -> Any:
    """A sampler that draws no noise: the Euler steps of flow matching, else DDIM (Song et al. 2021, η = 0)."""
    if NoiseProcess.from_scheduler(scheduler).prediction == "flow":
        return copy.deepcopy(scheduler)
    # DDIM's own default clips samples to -1..1, which only a scheduler of pixels asks for.
    return DDIMScheduler.from_config(scheduler.config, clip_sample=scheduler.config.get("clip_sample", False))


def _set_steps(denoiser: Denoiser, sampler: Any, steps: int, height: int, width: int) -> None:
    """Timesteps; shifted as the denoiser's family says where the shift depends on the image's size."""
    shifted = sampler.config.get("use_dynamic_shifting", False)
    sampler.set_timesteps(steps, **({"mu": denoiser.shift(sampler.config, height, width)} if shifted else {}))


@torch.no_grad()
def draw_latents(
    denoiser: Denoiser, model: nn.Module, scheduler: Any, conditions: Conditions, shape: Sequence[int], *,
    seed: int = 0, steps: int = 20, batch_size: int = DRAW_BATCH_SIZE,
) -> Tensor:
    """Samples of ``shape`` (N, C, H, W), one per row of ``conditions``, without classifier-free guidance.

    They start at the noise that the generator of ``seed`` draws, whatever the model; returned on the CPU. At most
    ``batch_size`` and DRAW_BATCH_SIZE rows are drawn at a time.
    """
    noise_NCHW = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))
    was_training, place, dtype = model.training, next(model.parameters()), dtype_of_rows(model)
    model.eval()
    drawn = []
    for part in torch.arange(len(noise_NCHW)).split(min(batch_size, DRAW_BATCH_SIZE)):
        sampler = sampler_of(scheduler)
        _set_steps(denoiser, sampler, steps, *noise_NCHW.shape[-2:])
        told = {
            name: value[part].to(place.device, dtype if value.is_floating_point() else None)
            for name, value in conditions.items()
        }
        sample = noise_NCHW[part].to(place.device, dtype) * getattr(sampler, "init_noise_sigma", 1.0)
        for timestep in sampler.timesteps:
            answer = denoiser.call(model, sample, timestep.to(place.device).expand(len(part)), told)
            sample = sampler.step(answer, timestep, sample).prev_sample
        drawn.append(sample.cpu().float())
    model.train(was_training)
    return torch.cat(drawn)


@torch.no_grad()
def decode(latents: Tensor, autoencoder: nn.Module | None) -> Tensor:
    """Pixels in −1..1: the latents themselves where the pipeline has no VAE."""
    if autoencoder is None:
        return latents.clamp(-1, 1)
    vae: Any = autoencoder
    config, place = vae.config, next(autoencoder.parameters())
    shift = getattr(config, "shift_factor", None) or 0.0
    parts = [
        vae.decode((part / config.scaling_factor + shift).to(place.device, place.dtype)).sample.cpu().float()
        for part in latents.split(8)
    ]
    return torch.cat(parts).clamp(-1, 1)


def to_images(pixels_NCHW: Tensor) -> list[Image.Image]:
    """Pixels in −1..1 as grey (C = 1) or colour images."""
    levels = ((pixels_NCHW + 1) * 127.5).round().clamp(0, 255).byte().numpy()
    return [Image.fromarray(row[0] if len(row) == 1 else np.moveaxis(row, 0, -1)) for row in levels]


def grid_png(pixels_NCHW: Tensor, columns: int) -> bytes:
    """Images side by side, row by row, as one PNG."""
    images = to_images(pixels_NCHW)
    width, height = images[0].size
    lines = -(-len(images) // columns)
    sheet = Image.new(images[0].mode, (columns * (width + _GAP) - _GAP, lines * (height + _GAP) - _GAP), "white")
    for place, image in enumerate(images):
        sheet.paste(image, (place % columns * (width + _GAP), place // columns * (height + _GAP)))
    stream = io.BytesIO()
    sheet.save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def split_grid(data: bytes, size: tuple[int, int]) -> list[list[Image.Image]]:
    """The images of a ``grid_png``, line by line. ``size`` is that of one image, (width, height).

    Raises:
        RecordError: not a PNG, or one that does not consist of whole images of that size.
    """
    try:
        sheet = Image.open(io.BytesIO(data), formats=["PNG"])
        sheet.load()
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise RecordError(f"expected a PNG of drawn images, got {error}: attack again.") from error
    places = [(whole + _GAP) / (part + _GAP) for whole, part in zip(sheet.size, size, strict=True)]
    if any(count != int(count) for count in places):
        raise RecordError(f"expected a picture of whole images of {size}, got one of {sheet.size}: attack again.")
    columns, lines = map(int, places)
    width, height = size
    return [
        [
            sheet.crop((left, top, left + width, top + height))
            for left in range(0, columns * (width + _GAP), width + _GAP)
        ]
        for top in range(0, lines * (height + _GAP), height + _GAP)
    ]
