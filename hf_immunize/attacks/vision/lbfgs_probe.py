"""Linear probing by L-BFGS with a line search: the quasi-Newton attacker, with no learning rate to tune."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from hf_immunize.attacks.core.shape import Attack, Result, Run, evaluation_steps, setting
from hf_immunize.attacks.vision._cost import probe_flops
from hf_immunize.attacks.vision._probes import ProbeData, initial_weights, judge, probe_data
from hf_immunize.attacks.vision.context import AttackContext
from hf_immunize.records import Evaluation
from hf_immunize.records.trace import Outcome


@dataclass(frozen=True)
class LbfgsProbe:
    """Full-batch L-BFGS (strong Wolfe) on cross-entropy with weight decay, with a bias."""

    weight_decay: float = setting(1e-4, "Penalty ½·decay·‖W‖² on the weights.", sweep=(1e-6, 1e-4, 1e-2))
    steps: int = setting(200, "Budget in L-BFGS iterations; each costs a few gradients.")
    features: str = setting("centered", "Feature map: raw, centered, standardized, whitened.")


def run(context: AttackContext, runs: Sequence[Run]) -> Iterator[tuple[Run, Result]]:
    """One probe after the other: every iteration's line search is its own."""
    for planned in runs:
        started = time.perf_counter()
        data = probe_data(context, [planned.seed], planned.config.features)
        passes: list[int] = []
        curve = list(_train(data, planned, passes))
        finite = len(curve) == len(evaluation_steps(planned.config.steps))
        seconds = time.perf_counter() - started
        outcome: Outcome = "completed" if finite else "diverged"
        note = None if finite else "logits were not finite"
        _, rows, width = data.train_GND.shape
        cost = probe_flops(rows, width, data.classes, len(passes))
        yield planned, Result(curve, planned.config.steps, seconds, outcome, note, rows * len(passes), cost)


def _train(data: ProbeData, planned: Run, passes: list[int]) -> Iterator[Evaluation]:
    """One evaluation per due step; ``passes`` grows by one entry per gradient, line searches counted."""
    weights = initial_weights(data, [planned.seed], 1).requires_grad_(True)
    features, labels = data.train_GND[0], data.train_labels_GN[0]
    optimizer = torch.optim.LBFGS([weights], max_iter=1, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        passes.append(1)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(features @ weights[0].T, labels)
        loss = loss + 0.5 * planned.config.weight_decay * weights[..., :-1].square().sum()
        loss.backward()
        return loss

    due = set(evaluation_steps(planned.config.steps))
    for step in range(1, planned.config.steps + 1):
        optimizer.step(closure)
        if step in due:
            validation, test, finite = judge(weights.detach(), data, 1)
            if not bool(finite):
                return
            yield Evaluation(step=step, validation=float(validation), test=float(test))


ATTACK = Attack(config=LbfgsProbe, run=run, family="whitened probing", covers="a condition number and rates")
