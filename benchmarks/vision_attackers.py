"""The attackers of vision_transfer.py: the package's own probes on features, and full fine-tuning of the tail."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_immunize.attacks import ATTACKS, AttackContext, plan_runs
from hf_immunize.attacks.vision._probes import (
    ProbeData,
    Update,
    adam,
    compress,
    gradient_descent,
    initial_weights,
    probe_data,
    train_probes,
)
from hf_immunize.data import PixelDataset

ROLES = ("attack", "validation", "test")
GD_RATES, GD_STEPS = (4.0, 64.0, 1024.0), 1000
ADAM_RATES, ADAM_STEPS = (1e-3, 1e-2, 1e-1), 300


@dataclass(frozen=True)
class Found:
    """The attacker's best trial by validation accuracy, and what it does on the test images."""

    validation: float
    test: float
    trial: str
    curve: tuple[tuple[int, float], ...]
    """(step, test accuracy) along the best trial."""


def context_of(features: dict[str, Tensor], labels: dict[str, Tensor], fraction: float = 1.0) -> AttackContext:
    """What the package's probes hold, from features alone. One seed's rows are ``fraction`` of each class."""
    names = [str(label) for label in range(int(labels["attack"].max()) + 1)]
    splits = {role: PixelDataset(features[role][:, :, None, None], labels[role], names, role) for role in ROLES}
    kept = {(None, "classifier"): features}
    return AttackContext(
        Path(), "subject", *splits.values(), data=(), feature_module="classifier", attack_fraction=fraction,
        _features=kept,
    )  # fmt: skip


def ridge(context: AttackContext, seed: int) -> Found:
    """The closed-form attacker, swept as the package does: six penalties, centred and standardized features."""
    attack = ATTACKS["ridge_probe"]
    made = [(run, result) for run, result in attack.run(context, plan_runs(attack, [seed])) if result.curve]
    run, result = max(made, key=lambda pair: pair[1].curve[0].validation)
    point = result.curve[0]
    return Found(point.validation, point.test, run.trial, ((1, point.test),))


def probe(context: AttackContext, seed: int, kind: str) -> Found:
    """Gradient descent on centred features, or Adam on standardized ones; best rate and stopping time."""
    rates, steps, mapped, update = {
        "gradient_descent": (GD_RATES, GD_STEPS, "centered", gradient_descent()),
        "standardized_adam": (ADAM_RATES, ADAM_STEPS, "standardized", adam()),
    }[kind]
    data = probe_data(context, [seed], mapped)
    weights = initial_weights(data, [seed], len(rates))
    if kind == "gradient_descent":
        data, weights = compress(data, weights)
    return _best(data, weights, rates, steps, update)


def _best(data: ProbeData, weights: Tensor, rates: Sequence[float], steps: int, update: Update) -> Found:
    curves: list[list[tuple[int, float, float]]] = [[] for _ in rates]
    for step, validation, test, finite in train_probes(data, weights, [(rates, update)], steps):
        for place, curve in enumerate(curves):
            if bool(finite[0, place]):
                curve.append((step, float(validation[0, place]), float(test[0, place])))
    place = max(range(len(rates)), key=lambda index: max((point[1] for point in curves[index]), default=-1))
    step, held, judged = max(curves[place], key=lambda point: point[1])
    path = tuple((at, accuracy) for at, _, accuracy in curves[place])
    return Found(held, judged, f"learning_rate={rates[place]:g},stop={step}", path)


def attack_all(features: dict[str, Tensor], labels: dict[str, Tensor], seed: int = 0) -> dict[str, Found]:
    """All three attackers on one model's features."""
    context = context_of(features, labels)
    return {
        "ridge": ridge(context, seed),
        "gradient_descent": probe(context, seed, "gradient_descent"),
        "standardized_adam": probe(context, seed, "standardized_adam"),
    }


def strongest(found: dict[str, Found]) -> Found:
    """The attacker one would choose: best validation accuracy."""
    return max(found.values(), key=lambda one: one.validation)


def signed_rfd(subject: Found, control: Found) -> float:
    """Percent of the control's accuracy that the attacker lost at the best trial: (control − subject)/control."""
    return 100 * (control.test - subject.test) / control.test


def curve_rfd(subject: Found, control: Found) -> float:
    """Signed RFD over shared evaluations, as metrics.relative_fine_tuning_deviation defines it, in percent."""
    mine = dict(subject.curve)
    shared = [(base, mine[step]) for step, base in control.curve if step in mine and base > 0]
    return 100 * sum((base - attacked) / base for base, attacked in shared) / len(shared)


def fine_tune(
    tail: nn.Module, splits: dict[str, Any], *, rate: float, steps: int, every: int, batch: int = 32, seed: int = 0
) -> list[tuple[int, float]]:
    """(step, test accuracy) of AdamW on the whole tail with a new head, cross-entropy on the attacker's images."""
    torch.manual_seed(seed)
    model = copy.deepcopy(tail).eval()  # BatchNorm keeps its statistics: batches are small
    classes = int(splits["attack"].labels.max()) + 1
    model.classifier = nn.Linear(model.classifier.in_features, classes)
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    curve = []
    for step in range(1, steps + 1):
        rows = torch.randint(len(splits["attack"]), (batch,))
        loss = model(splits["attack"].pixel_values[rows], labels=splits["attack"].labels[rows]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % every == 0:
            with torch.no_grad():
                parts = splits["test"].pixel_values.split(128)
                hits = torch.cat([model(part).logits.argmax(dim=1) for part in parts]) == splits["test"].labels
            curve.append((step, float(hits.double().mean())))
    return curve


__all__ = ["Found", "attack_all", "curve_rfd", "fine_tune", "signed_rfd", "strongest"]
