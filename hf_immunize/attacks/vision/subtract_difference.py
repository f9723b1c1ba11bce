"""Take the immunization out again: the attacker who holds the base subtracts the difference of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_immunize.attacks.core.shape import Attack, Result, Run, lacking, not_applicable, setting
from hf_immunize.attacks.vision._finetune import FinetuneConfig, run_finetunes
from hf_immunize.attacks.vision.context import AttackContext
from hf_immunize.linalg import truncated
from hf_immunize.models import load_classifier


@dataclass(frozen=True)
class SubtractDifference(FinetuneConfig):
    """AdamW on all weights of θ_I − share·(θ_I − θ_0), with a new head.

    With the whole difference this is fine-tuning of the base: it says nothing about the immunized weights but that
    they protect nothing where the base can be had. Only shares below 1, or a low rank of the difference, tell how
    firmly the immunization sits in them.
    """

    learning_rate: float = setting(1e-3, "Peak learning rate.", sweep=(1e-5, 1e-4, 1e-3, 1e-2))
    share: float = setting(1.0, "Share of the difference that is subtracted.")
    rank: int = setting(0, "Subtract only this many leading singular directions per weight; 0 = all.")


NEEDS = ("base",)


def run(context: AttackContext, runs: Sequence[Run]) -> Iterator[tuple[Run, Result]]:
    """One Trainer per run."""
    why = lacking(NEEDS, context)
    if context.role == "scratch":
        why = "random weights differ from the base in everything"
    yield from not_applicable(runs, why) if why else run_finetunes(context, runs, _prepare)


def _prepare(context: AttackContext, planned: Run) -> nn.Module:
    model = context.model(planned.seed)
    assert context.base is not None  # as nothing is lacking
    base = load_classifier(context.base).state_dict()
    for name, value in model.state_dict().items():
        if value.is_floating_point() and name in base and base[name].shape == value.shape:
            difference = value - base[name].to(value)
            value.sub_(planned.config.share * _leading(difference, planned.config.rank))
    return context.with_new_head(model, planned.seed).requires_grad_(True)


def _leading(difference: Tensor, rank: int) -> Tensor:
    """The best approximation of a rank, of weights with at least two sides; everything else whole."""
    if rank == 0 or difference.dim() < 2:
        return difference
    with torch.no_grad():
        return truncated(difference.flatten(1), rank).view_as(difference)


ATTACK = Attack(
    config=SubtractDifference, run=run, family="structural", needs=NEEDS,
    covers="everything, where the base is public", refuses="random weights, which share nothing with the base",
)
