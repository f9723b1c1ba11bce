"""DreamBooth: all weights on a handful of images, without and with prior preservation (Ruiz et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from hf_immunize.attacks.core.shape import Attack, Result, Run, lacking, not_applicable, setting
from hf_immunize.attacks.diffusion._finetune import DiffusionFinetune, finetune
from hf_immunize.attacks.diffusion.context import DiffusionAttackContext
from hf_immunize.attacks.diffusion.full_finetune import unfrozen
from hf_immunize.diffusion import LatentDataset, draw_latents


@dataclass(frozen=True)
class DreamBooth(DiffusionFinetune):
    """AdamW on all weights of the denoiser, with few images of the concept."""

    learning_rate: float = setting(1e-4, "Peak learning rate of AdamW.",
                                   sweep=(5e-6, 1e-4, 1e-3), search=(5e-6, 1e-4, 1e-3))
    batch_size: int = setting(4, "Images per step.")
    images: int = setting(5, "Images of the concept the attacker has.")


@dataclass(frozen=True)
class DreamBoothPrior(DreamBooth):
    """DreamBooth that also fits images of retained concepts which the attacked model drew before the attack."""

    prior_weight: float = setting(1.0, "Weight of the loss on drawn images.")
    prior_images: int = setting(16, "Images the attacked model draws of retained concepts.")


def run(context: DiffusionAttackContext, runs: Sequence[Run]) -> Iterator[tuple[Run, Result]]:
    """One loop per run on the first ``images`` rows of its seed."""
    for planned in runs:
        config = planned.config
        model, prior = unfrozen(context, planned), None
        if isinstance(config, DreamBoothPrior):
            prior = prior_of(context, model, config, planned.seed)
        rows = few_rows(context, config.images, planned.seed)
        yield planned, finetune(
            context, model, config, planned.seed, rows=rows, prior=prior,
            prior_weight=getattr(config, "prior_weight", 0.0),
        )


def run_with_prior(context: DiffusionAttackContext, runs: Sequence[Run]) -> Iterator[tuple[Run, Result]]:
    """The same, where the attacker has conditions to draw retained concepts by."""
    why = lacking(PRIOR.needs, context)
    yield from not_applicable(runs, why) if why else run(context, runs)


def few_rows(context: DiffusionAttackContext, images: int, seed: int) -> torch.Tensor:
    """``images`` rows of those this seed trains on, in an order of the seed."""
    rows = context.draw_rows(seed)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:images]]


def prior_of(
    context: DiffusionAttackContext, model: torch.nn.Module, config: DreamBoothPrior, seed: int
) -> LatentDataset:
    """Latents that the attacked model draws for retained conditions, each in turn, from other noise every time."""
    assert context.prior is not None
    order = torch.randperm(len(context.prior), generator=torch.Generator().manual_seed(seed))
    rows = order[torch.arange(config.prior_images) % len(order)]
    batch = context.prior.batch(rows)
    latents = draw_latents(
        context.denoiser, model, context.scheduler, batch.conditions, batch.latents.shape, seed=seed,
        batch_size=context.eval_batch_size,
    )
    return LatentDataset(latents, batch.conditions, batch.labels, context.prior.label_names, "prior")


ATTACK = Attack(
    config=DreamBooth, run=run, family="DreamBooth", own_threshold=True, covers="a defence that counts on many images"
)
PRIOR = Attack(
    config=DreamBoothPrior, run=run_with_prior, family="DreamBooth", own_threshold=True, needs=("prior",),
    covers="a defence that lets other concepts fall apart while this one is learned",
)
