"""The training loop of diffusers' own examples, on a concept's images, judged on images it has not seen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_immunize.attacks.core.means import autocast_of, products
from hf_immunize.attacks.core.parts import Parts
from hf_immunize.attacks.core.shape import Result, Run, evaluation_steps, setting
from hf_immunize.attacks.diffusion.context import DiffusionAttackContext
from hf_immunize.diffusion import LatentBatch, LatentDataset, denoising_losses, drawing_steps, grid_png, schedule_of
from hf_immunize.errors import ConfigError
from hf_immunize.records import Evaluation
from hf_immunize.records.trace import Outcome

_EVALUATION_RATIO = 1.5
_LEAST = (
    ("learning_rate", 0, True), ("steps", 1, False), ("batch_size", 1, False), ("warmup_steps", 0, False),
    ("weight_decay", 0, False), ("max_grad_norm", 0, False), ("min_snr_gamma", 0, True), ("rank", 1, False),
    ("alpha", 0, True), ("images", 1, False), ("prior_images", 1, False), ("prior_weight", 0, False),
    ("noise", 0, False), ("shift", 0, False),
)
"""Bounds of whatever fields an attack has: name, bound, and whether the bound itself is out."""


@dataclass(frozen=True)
class DiffusionFinetune:
    """What every attack that trains a denoiser is told."""

    learning_rate: float = setting(1e-4, "Peak learning rate of AdamW.",
                                   sweep=(1e-5, 1e-4, 1e-3, 1e-2), search=(1e-5, 1e-4, 1e-3, 1e-2))
    steps: int = setting(200, "Budget in optimizer steps.")
    batch_size: int = setting(16, "Images per step.")
    scheduler: str = setting("constant", "Name of a diffusers.optimization schedule.")
    warmup_steps: int = setting(0, "Steps of linear warm-up.")
    weight_decay: float = setting(1e-2, "Decoupled weight decay.")
    max_grad_norm: float = setting(1.0, "Gradient clipping; 0 switches it off.")
    min_snr_gamma: float | None = setting(None, "Min-SNR weighting with this gamma.")

    def __post_init__(self) -> None:
        for name, least, strictly in _LEAST:
            value = getattr(self, name, None)
            if value is not None and not (value > least if strictly else value >= least):
                raise ConfigError(f"expected {name} {'above' if strictly else 'of at least'} {least}, got {value}.")


def judge(context: DiffusionAttackContext, model: nn.Module, step: int) -> Evaluation | None:
    """R² on both held-out splits; None when an answer is not finite."""
    with products("float32"):
        validation, test = (exam.ask(context.denoiser, model).explained for exam in context.exams)
    if not (math.isfinite(validation) and math.isfinite(test)):
        return None
    return Evaluation(step=step, validation=validation, test=test)


def finetune(
    context: DiffusionAttackContext, model: nn.Module, config: DiffusionFinetune, seed: int, *,
    rows: Tensor | None = None, prior: LatentDataset | None = None, prior_weight: float = 0.0,
) -> Result:
    """Train the parameters of ``model`` that ask for gradients; return the learning curve, from step 0 on.

    Images, noise and levels are drawn from the seed alone, so that every model sees the same attack.

    Args:
        rows: rows of the attack split to train on; by default those of the seed.
        prior, prior_weight: further rows of every step, and the weight of the loss on them.
    """
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    data = context.attack.subset(context.draw_rows(seed) if rows is None else rows)
    parts = [(data, 1.0), *([(prior, prior_weight)] if prior is not None else [])]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = schedule_of(config.scheduler, optimizer, warmup_steps=config.warmup_steps, steps=config.steps)
    due = {0, *evaluation_steps(config.steps, _EVALUATION_RATIO)}
    moments, lines = drawing_steps(config.steps), list[Tensor]()
    curve: list[Evaluation] = []
    note = None
    with products(context.means.precision), Parts(model, context.means) as held:
        for step in range(config.steps + 1):
            if step > 0 and not math.isfinite(_step(context, held, parts, config, generator, optimizer, schedule)):
                note = f"the training loss was not finite at step {step}"
            elif step in due and (point := judge(context, model, step)) is not None:
                curve.append(point)
            elif step in due:
                note = f"answers were not finite at step {step}"
            if note:
                break
            if step in moments and (drawn := context.drawn(model)) is not None:
                lines.append(drawn)
    outcome: Outcome = "diverged" if note else "completed"
    seconds, samples = time.perf_counter() - started, config.steps * config.batch_size
    picture = grid_png(torch.cat(lines), context.pictures) if lines and not note else None
    told = "; ".join(text for text in (note, *held.notes) if text) or None
    return Result(curve, config.steps, seconds, outcome, told, samples, picture=picture)


def _step(
    context: DiffusionAttackContext, held: Parts, parts: Sequence[tuple[LatentDataset, float]],
    config: DiffusionFinetune, generator: torch.Generator, optimizer: torch.optim.Optimizer, schedule: Any,
) -> float:
    """One optimizer step on the weighted losses of all parts; its loss."""
    held.model.train()
    drawn = [(weight, _draw(context, held.model, data, config, generator)) for data, weight in parts]

    def backward(place: slice, share: float) -> float:
        losses = [weight * share * _loss(context, held.model, batch, config, place) for weight, batch in drawn]
        loss = sum(losses[1:], losses[0])
        loss.backward()
        return float(loss.detach())

    total = sum(held.step(config.batch_size, backward))
    if config.max_grad_norm > 0:
        torch.nn.utils.clip_grad_norm_([p for p in held.model.parameters() if p.requires_grad], config.max_grad_norm)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad(set_to_none=True)
    return total


@dataclass(frozen=True)
class _Drawn:
    """The questions of one step, and the seed of its dropout."""

    batch: LatentBatch
    levels: Tensor
    noise: Tensor
    seed: int


def _draw(
    context: DiffusionAttackContext, model: nn.Module, data: LatentDataset, config: DiffusionFinetune,
    generator: torch.Generator,
) -> _Drawn:
    """One batch of the generator's rows, noise and levels."""
    process, place = context.process, next(model.parameters())
    rows = torch.randint(len(data), (config.batch_size,), generator=generator)
    levels = process.draw_levels(len(rows), generator, logit_normal=process.prediction == "flow").to(place.device)
    noise = torch.randn((len(rows), *data.latents.shape[1:]), generator=generator).to(place.device, place.dtype)
    batch = data.batch(rows).to(place.device, place.dtype)
    return _Drawn(batch, levels, noise, int(torch.randint(2**62, (1,), generator=generator)))


def _loss(
    context: DiffusionAttackContext, model: nn.Module, drawn: _Drawn, config: DiffusionFinetune, place: slice
) -> Tensor:
    """Mean denoising loss of some rows of a batch."""
    process, device = context.process, drawn.noise.device
    latents, levels, noise = drawn.batch.latents[place], drawn.levels[place], drawn.noise[place]
    conditions = {name: value[place] for name, value in drawn.batch.conditions.items()}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(drawn.seed + place.start)  # dropout
        noisy = process.noisy(latents, noise, levels)
        with autocast_of(context.means, device.type):
            answer = context.denoiser.call(model, noisy, process.timesteps(levels), conditions)
        losses = denoising_losses(answer, process.target(latents, noise, levels))
        if config.min_snr_gamma is not None:
            losses = losses * process.min_snr_weight(levels, config.min_snr_gamma).to(losses)
        return losses.mean()


def run_finetunes(
    context: DiffusionAttackContext, runs: Sequence[Run], prepare: Callable[[DiffusionAttackContext, Run], nn.Module]
) -> Iterator[tuple[Run, Result]]:
    """Prepare and train one denoiser per run."""
    for run in runs:
        yield run, finetune(context, prepare(context, run), run.config, run.seed)
