"""Re-estimate batch-normalisation statistics on the attacker's images, then solve a ridge probe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_immunize.attacks.core.shape import Attack, Result, Run, setting
from hf_immunize.attacks.vision.context import AttackContext
from hf_immunize.attacks.vision.ridge_probe import solve_runs
from hf_immunize.data import batches

_STATISTICS_ROWS = 256
"""Rows per batch while statistics are averaged: a variance within few rows is too small."""


@dataclass(frozen=True)
class BatchNormProbe:
    """Ridge regression on features after every batch norm has met the attacker's images."""

    penalty: float = setting(1e-4, "Ridge penalty relative to σ₁² of the features.", sweep=(1e-2, 1e-4, 1e-6))
    features: str = setting("standardized", "Feature map before the solve.")


def run(context: AttackContext, runs: Sequence[Run]) -> Iterator[tuple[Run, Result]]:
    """Solve every run; statistics come from the seed's own training rows."""
    if not any(isinstance(module, _BatchNorm) for module in context.model(0).modules()):
        for planned in runs:
            yield planned, Result([], 1, 0.0, "not_applicable", "the model has no batch normalisation")
        return
    yield from solve_runs(context, runs, lambda run: _features(context, run.seed))


def _features(context: AttackContext, seed: int) -> dict[str, Tensor]:
    model = reestimate(context.model(seed), context, seed)
    return context.features_of(model, context.head)


@torch.no_grad()
def reestimate(model: nn.Module, context: AttackContext, seed: int) -> nn.Module:
    """Replace running statistics by plain averages over the seed's rows, in batches as large as memory is used to."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    model.eval()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
        norm.train()
    for batch in batches(context.attack.subset(context.draw_rows(seed)), _STATISTICS_ROWS):
        model(pixel_values=batch["pixel_values"].to(context.device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


ATTACK = Attack(
    config=BatchNormProbe, run=run, family="structural", unit="solve",
    covers="batch statistics of other images", refuses="models without batch normalisation",
)
