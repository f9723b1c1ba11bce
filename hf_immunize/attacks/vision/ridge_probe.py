"""The closed-form attacker: ridge regression, which no condition number slows down."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from hf_immunize.attacks.core.shape import Attack, Result, Run, setting
from hf_immunize.attacks.vision._cost import ridge_flops
from hf_immunize.attacks.vision._probes import ProbeData, probe_data
from hf_immunize.attacks.vision.context import AttackContext
from hf_immunize.errors import DecompositionError
from hf_immunize.linalg import converging, ridge_weights
from hf_immunize.records import Evaluation


@dataclass(frozen=True)
class RidgeProbe:
    """W = argmin ‖Φ_cW − Y_c‖² + λ‖W‖² on one-hot labels, λ = penalty × σ₁²(Φ_c); the largest output wins."""

    penalty: float = setting(1e-4, "λ relative to the squared largest singular value of the training features.",
                             sweep=(1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 1e-8))
    features: str = setting("centered", "Feature map: centered keeps the spectrum, standardized rescales columns "
                            "first.", sweep=("centered", "standardized"))


def run(context: AttackContext, runs: Sequence[Run]) -> Iterator[tuple[Run, Result]]:
    """Solve every run on the head's features."""
    yield from solve_runs(context, runs, lambda run: context.features(run.seed))


def solve_runs(
    context: AttackContext, runs: Sequence[Run], features_of: Callable[[Run], dict[str, Tensor]]
) -> Iterator[tuple[Run, Result]]:
    """Solve every run on ``features_of(run)``; runs that differ in the penalty alone share their mapped features."""
    data: dict[object, ProbeData] = {}
    for planned in runs:
        started = time.perf_counter()
        key = (planned.seed, replace(planned.config, penalty=0.0))
        if key not in data:
            features = features_of(planned)
            data[key] = probe_data(context, [planned.seed], planned.config.features, partial(_kept, features))
        yield planned, _solve(data[key], planned.config.penalty, started)


def _kept(features: dict[str, Tensor], _: int) -> dict[str, Tensor]:
    return features


def _solve(data: ProbeData, penalty: float, started: float) -> Result:
    phi, judged = data.train_GND[0, :, :-1], data.judged_GMD[0, :, :-1]
    labels = torch.nn.functional.one_hot(data.train_labels_GN[0], data.classes).to(phi)
    mean, label_mean = phi.mean(dim=0), labels.mean(dim=0)
    try:
        with converging():
            sigma_1 = torch.linalg.matrix_norm(phi - mean, ord=2)
        # tiny: features that are zero everywhere must still solve (to weights of zero, and accuracy at chance).
        shift = (penalty * sigma_1.square()).clamp(min=torch.finfo(phi.dtype).tiny)
        weights = ridge_weights(phi - mean, labels - label_mean, shift)
    except DecompositionError as error:
        return Result([], 1, time.perf_counter() - started, "diverged", f"the solve failed: {error}")
    hits = (((judged - mean) @ weights + label_mean).argmax(dim=1) == data.judged_labels_M).double()
    held = data.validation_rows
    point = Evaluation(step=1, validation=float(hits[:held].mean()), test=float(hits[held:].mean()))
    rows, width = phi.shape
    cost = ridge_flops(rows, width, data.classes)
    return Result([point], 1, time.perf_counter() - started, samples=rows, flops=cost)


ATTACK = Attack(
    config=RidgeProbe, run=run, family="whitened probing", unit="solve",
    covers="any condition number, in one solve",
)
