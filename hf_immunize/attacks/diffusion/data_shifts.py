"""Shifts of the attacker's data, which broke published defences such as IMMA.

Perturbed images, images from another source, and other names for the concept: another one, a placeholder that means
nothing, a generic one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_immunize.attacks.core.shape import Attack, Result, Run, lacking, not_applicable, setting
from hf_immunize.attacks.diffusion._finetune import run_finetunes
from hf_immunize.attacks.diffusion.context import DiffusionAttackContext
from hf_immunize.attacks.diffusion.lora import DiffusionLora, adapted
from hf_immunize.diffusion import LatentDataset

_NO_PIXELS = "the attacker of this exam holds latents of the concept's images alone (context.pixels)"


@dataclass(frozen=True)
class PerturbedImages(DiffusionLora):
    """LoRA on perturbed images of the concept; judged on clean ones."""

    noise: float = setting(0.1, "Standard deviation of the noise, images being in -1..1.")
    shift: float = setting(0.07, "Largest shift of an image, as a share of its side.")


def perturbed(images: Tensor, noise: float, shift: int, seed: int) -> Tensor:
    """Every row shifted by up to ``shift`` pixels in both directions, its edge repeated, with noise added."""
    generator = torch.Generator().manual_seed(seed)
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (shift,) * 4, mode="replicate")
    places = torch.randint(2 * shift + 1, (count, 2), generator=generator).tolist()
    moved = torch.stack([row[:, down : down + height, over : over + width]
                         for row, (down, over) in zip(padded, places, strict=True)])
    return moved + noise * torch.randn(moved.shape, generator=generator).to(moved)


def run_perturbed(context: DiffusionAttackContext, runs: Sequence[Run]) -> Iterator[tuple[Run, Result]]:
    """LoRA with images perturbed anew for every seed and trial; a VAE, where there is one, encodes them afterwards."""
    latent = getattr(context.pipeline, "vae", None) is not None
    images = context.pixels if latent else context.attack.latents
    if images is None:
        yield from not_applicable(runs, _NO_PIXELS)
        return
    for planned in runs:
        config = planned.config
        shift = max(1, round(config.shift * images.shape[-1])) if config.shift > 0 else 0
        changed = perturbed(images, config.noise, shift, planned.seed)
        data = dataclasses.replace(context, attack=_with_latents(context, changed, latent))
        yield from run_finetunes(data, [planned], adapted)


def _with_latents(context: DiffusionAttackContext, images: Tensor, latent: bool) -> LatentDataset:
    if latent:
        from hf_immunize.diffusion.encoding import encode_pixels  # brings transformers

        images = encode_pixels(context.pipeline, images)
    rows = context.attack
    return LatentDataset(images, rows.conditions, rows.labels, rows.label_names)


@dataclass(frozen=True)
class OtherImages(DiffusionLora):
    """LoRA on images of the concept from another source; judged on the exam's."""


def run_other_images(context: DiffusionAttackContext, runs: Sequence[Run]) -> Iterator[tuple[Run, Result]]:
    """LoRA with the other images in place of the attack split."""
    if why := lacking(OTHER_IMAGES.needs, context):
        yield from not_applicable(runs, why)
        return
    assert context.other_images is not None  # as nothing is lacking
    yield from run_finetunes(dataclasses.replace(context, attack=context.other_images, pixels=None), runs, adapted)


def renamed(dataset: LatentDataset, other: Mapping[str, Tensor]) -> LatentDataset:
    """The same latents under the conditions of one other row."""
    conditions = {name: value.expand(len(dataset), *value.shape[1:]) for name, value in other.items()}
    return LatentDataset(dataset.latents, conditions, dataset.labels, dataset.label_names)


@dataclass(frozen=True)
class OtherPrompts(DiffusionLora):
    """LoRA that teaches the concept under another name, and is judged under it."""


def _under(name: str) -> Attack:
    """The attack that uses the context's conditions of this name."""

    def run(context: DiffusionAttackContext, runs: Sequence[Run]) -> Iterator[tuple[Run, Result]]:
        if why := lacking((name,), context):
            yield from not_applicable(runs, why)
            return
        splits: dict[str, Any] = {part: renamed(getattr(context, part), getattr(context, name))
                  for part in ("attack", "validation", "test")}
        yield from run_finetunes(dataclasses.replace(context, **splits), runs, adapted)

    return Attack(
        config=OtherPrompts, run=run, family="data shift", own_threshold=True, needs=(name,),
        covers="a defence that is bound to the concept's name",
    )


_SAME_IMAGES = "a defence fitted to the very images"
PERTURBED = Attack(
    config=PerturbedImages, run=run_perturbed, family="data shift", own_threshold=True, covers=_SAME_IMAGES,
    refuses="pipelines with a VAE, where the attacker holds the images' latents alone",
)
OTHER_IMAGES = Attack(
    config=OtherImages, run=run_other_images, family="data shift", own_threshold=True, needs=("other_images",),
    covers=_SAME_IMAGES,
)
OTHER_NAME, PLACEHOLDER, GENERIC = (_under(name) for name in ("other", "placeholder", "generic"))
