"""A ridge probe on the outputs of blocks along the whole trunk at once: what no single layer shows, all may show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_immunize.attacks.core.shape import Attack, Result, Run, not_applicable, setting
from hf_immunize.attacks.vision._blocks import NO_BLOCKS, block_sites
from hf_immunize.attacks.vision.context import AttackContext
from hf_immunize.attacks.vision.ridge_probe import solve_runs
from hf_immunize.errors import CaptureError, ModelError

_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Blocks along the trunk: the same as those of ``earlier_layer_probe``, whose features are then there already."""


@dataclass(frozen=True)
class AllLayersProbe:
    """Ridge regression on five blocks' outputs and the head's input, standardized and side by side."""

    penalty: float = setting(1e-4, "Ridge penalty relative to σ₁² of the features.",
                             sweep=(1e-1, 1e-2, 1e-3, 1e-4, 1e-6))
    features: str = setting("standardized", "Feature map before the solve.")


def run(context: AttackContext, runs: Sequence[Run]) -> Iterator[tuple[Run, Result]]:
    """Solve every run. Trunks without one row per image anywhere are not applicable."""
    solved = 0
    try:
        sites = block_sites(context.model(0), context.head)
        chosen = dict.fromkeys(sites[round(depth * (len(sites) - 1))] for depth in _DEPTHS)
        for pair in solve_runs(context, runs, lambda planned: side_by_side(context, planned.seed, list(chosen))):
            solved += 1
            yield pair
    except (ModelError, CaptureError) as error:
        yield from not_applicable(runs[solved:], str(error))


def side_by_side(context: AttackContext, seed: int, sites: Sequence[str]) -> dict[str, Tensor]:
    """Features of the three splits at all of the sites and at the head, concatenated."""
    parts = [context.features(seed, site) for site in (*sites, context.head)]
    return {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}


ATTACK = Attack(
    config=AllLayersProbe, run=run, family="structural", unit="solve", refuses=NO_BLOCKS,
    covers="features taken apart, so that no layer alone holds what is needed",
)
