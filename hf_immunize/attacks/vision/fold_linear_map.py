"""Undo a linear layer that was slipped in: find the linear map back to the base's features and fold it into the head.

A compensated invertible layer before the head keeps the function and ruins the conditioning (Rosati et al. 2026). The
attacker who holds the base sees it: on any images, the base's features are a linear map of the immunized ones. The map
is fitted in closed form on the attacker's own rows, without labels, and probing goes on in the base's coordinates.
Where no such map exists the attack still probes the best linear prediction of the base's features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from hf_immunize.attacks.core.shape import Attack, Result, Run, lacking, not_applicable, setting
from hf_immunize.attacks.vision._probes import gradient_descent, run_probes
from hf_immunize.attacks.vision.context import AttackContext
from hf_immunize.linalg import fit_linear_map
from hf_immunize.models import load_classifier


@dataclass(frozen=True)
class FoldLinearMap:
    """Full-batch gradient descent on Φ_I·M with M = argmin ‖Φ_I·M − Φ_0‖², rates as in linear_probe_gd."""

    learning_rate: float = setting(4.0, "Step size in units of 1/λ₁ of the centred folded features.",
                                   sweep=(0.1, 1.0, 4.0, 16.0, 64.0, 256.0, 1024.0))
    steps: int = setting(20000, "Budget in gradient steps.")
    features: str = setting("centered", "Feature map after folding.")


NEEDS = ("base",)


def run(context: AttackContext, runs: Sequence[Run]) -> Iterator[tuple[Run, Result]]:
    """Train every run as one tensor program; each note tells how much of the base's features the map explains."""
    why = lacking(NEEDS, context)
    if context.role == "scratch":
        why = "random weights are no re-parameterisation of the base"
    if why:
        yield from not_applicable(runs, why)
        return
    assert context.base is not None  # as nothing is lacking
    base = context.features_of(load_classifier(context.base).to(context.device), context.head)
    folded = {seed: fold(context, base, seed) for seed in sorted({planned.seed for planned in runs})}
    found = run_probes(context, runs, gradient_descent, lambda seed: folded[seed][0])
    for planned, result in found:
        explained = f"a linear map explains {folded[planned.seed][1]:.4f} of the base's feature variance"
        yield planned, replace(result, note=f"{result.note}; {explained}" if result.note else explained)


def fold(context: AttackContext, base: dict[str, Tensor], seed: int) -> tuple[dict[str, Tensor], float]:
    """Features of the three splits in the base's coordinates, and the map's R² on the validation rows."""
    mine = context.features(seed)
    rows = context.draw_rows(seed)
    found = fit_linear_map(mine["attack"][rows], base["attack"][rows])
    return {name: found(value) for name, value in mine.items()}, found.explained(mine["validation"], base["validation"])


ATTACK = Attack(
    config=FoldLinearMap, run=run, family="structural", needs=NEEDS, batched=True,
    covers="an invertible layer that was slipped in", refuses="random weights, which share nothing with the base",
)
