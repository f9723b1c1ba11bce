"""Shifts of the attacker's data that broke published defences: perturbed images, another name for the concept."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_immunize.attacks.diffusion._finetune import run_finetunes
from hf_immunize.attacks.diffusion.context import DiffusionAttackContext
from hf_immunize.attacks.diffusion.lora import DiffusionLora, adapted
from hf_immunize.attacks.shape import Attack, Result, Run, not_applicable
from hf_immunize.diffusion import LatentDataset

_NO_NAME = "the attacker of this exam holds no other name for the concept (context.other)"


@dataclass(frozen=True)
class PerturbedImages(DiffusionLora):
    """LoRA on perturbed images of the concept; judged on clean ones."""

    noise: float = field(default=0.1, metadata={"help": "Standard deviation of the noise, images being in -1..1."})
    shift: int = field(default=1, metadata={"help": "Largest shift of an image, in pixels of the latents."})


def perturbed(dataset: LatentDataset, noise: float, shift: int, seed: int) -> LatentDataset:
    """Every row shifted by up to ``shift`` in both directions, its edge repeated, with noise added."""
    generator = torch.Generator().manual_seed(seed)
    count, _, height, width = dataset.latents.shape
    padded = torch.nn.functional.pad(dataset.latents, (shift,) * 4, mode="replicate")
    places = torch.randint(2 * shift + 1, (count, 2), generator=generator).tolist()
    moved = torch.stack([row[:, down : down + height, over : over + width]
                         for row, (down, over) in zip(padded, places, strict=True)])
    latents = moved + noise * torch.randn(moved.shape, generator=generator).to(moved)
    return LatentDataset(latents, dataset.conditions, dataset.labels, dataset.label_names)


def run_perturbed(context: DiffusionAttackContext, runs: Sequence[Run]) -> Iterator[tuple[Run, Result]]:
    """LoRA with images perturbed anew for every seed and trial."""
    for planned in runs:
        config = planned.config
        data = perturbed(context.attack, config.noise, config.shift, planned.seed)
        yield from run_finetunes(dataclasses.replace(context, attack=data), [planned], adapted)


def renamed(dataset: LatentDataset, other: Mapping[str, Tensor]) -> LatentDataset:
    """The same latents under the conditions of one other row."""
    conditions = {name: value.expand(len(dataset), *value.shape[1:]) for name, value in other.items()}
    return LatentDataset(dataset.latents, conditions, dataset.labels, dataset.label_names)


@dataclass(frozen=True)
class OtherPrompts(DiffusionLora):
    """LoRA that teaches the concept under another name, and is judged under it."""


def run_renamed(context: DiffusionAttackContext, runs: Sequence[Run]) -> Iterator[tuple[Run, Result]]:
    """LoRA with all three splits under the other name."""
    if context.other is None:
        yield from not_applicable(runs, _NO_NAME)
        return
    splits = {name: renamed(getattr(context, name), context.other) for name in ("attack", "validation", "test")}
    yield from run_finetunes(dataclasses.replace(context, **splits), runs, adapted)


PERTURBED = Attack(config=PerturbedImages, run=run_perturbed, family="data shift", own_threshold=True)
RENAMED = Attack(config=OtherPrompts, run=run_renamed, family="data shift", own_threshold=True)
