"""Attackers without the model: what the harmful data alone gives, from raw pixels and from hand-made features.

They are references, not attacks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hf_immunize.attacks.core.shape import Attack, Result, Run, evaluation_steps, setting
from hf_immunize.attacks.vision import ridge_probe
from hf_immunize.attacks.vision.context import AttackContext
from hf_immunize.attacks.vision.hand_made import colour_histograms, direction_histograms
from hf_immunize.data import batches
from hf_immunize.linalg.whitening import fit_feature_map
from hf_immunize.records import Evaluation

FAMILY = "without the model"


@dataclass(frozen=True)
class PixelNetwork:
    """A network with one hidden layer on standardized pixels, trained by Adam."""

    learning_rate: float = setting(1e-3, "Step size.", sweep=(1e-3, 1e-2))
    steps: int = setting(300, "Optimizer steps.")
    batch_size: int = setting(128, "Rows of a step.")
    hidden: int = setting(128, "Units of the hidden layer.")


def train_network(context: AttackContext, runs: Sequence[Run]) -> Iterator[tuple[Run, Result]]:
    """Train every run; seeds draw rows, initial weights and batches."""
    for planned in runs:
        yield planned, _train(context, planned)


def _train(context: AttackContext, planned: Run) -> Result:
    started, config = time.perf_counter(), planned.config
    features, rows = context.features(planned.seed), context.draw_rows(planned.seed)
    mapped = fit_feature_map(features["attack"][rows], "standardized")
    train, labels = mapped(features["attack"][rows]).float(), context.attack.labels[rows]
    held = {split: mapped(features[split]).float() for split in ("validation", "test")}
    generator = torch.Generator().manual_seed(planned.seed)
    with torch.random.fork_rng():
        torch.manual_seed(planned.seed)
        network = nn.Sequential(
            nn.Linear(train.shape[1], config.hidden), nn.ReLU(), nn.Linear(config.hidden, context.classes)
        )
    optimizer = torch.optim.Adam(network.parameters(), config.learning_rate)
    looked, curve = set(evaluation_steps(config.steps)), []
    size = min(config.batch_size, len(train))
    for step in range(1, config.steps + 1):
        batch = torch.randperm(len(train), generator=generator)[:size]
        loss = nn.functional.cross_entropy(network(train[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in looked:
            scores = {split: _accuracy(network, rows, getattr(context, split).labels) for split, rows in held.items()}
            curve.append(Evaluation(step=step, **scores))
    samples, parameters = size * config.steps, sum(part.numel() for part in network.parameters())
    return Result(curve, config.steps, time.perf_counter() - started, samples=samples, flops=6.0 * parameters * samples)


@torch.no_grad()
def _accuracy(network: nn.Module, rows: Tensor, labels: Tensor) -> float:
    return float((network(rows).argmax(dim=1) == labels).double().mean())


_SIDE = 64
"""Larger images are averaged down to this side before their gradients are taken."""


@dataclass(frozen=True)
class HandMadeRidge(ridge_probe.RidgeProbe):
    """Ridge regression on histograms of gradient directions and of colours."""


def solve_hand_made(context: AttackContext, runs: Sequence[Run]) -> Iterator[tuple[Run, Result]]:
    """Solve every run on features that no training made."""
    features = context.once("hand-made features", 0, lambda: hand_made_features(context))
    yield from ridge_probe.solve_runs(context, runs, lambda run: features)


def hand_made_features(context: AttackContext) -> dict[str, Tensor]:
    """Of the three splits; bins of colours span the values of the attacker's own images."""
    splits = {"attack": context.attack, "validation": context.validation, "test": context.test}
    lowest, highest = (
        torch.stack([extreme(batch["pixel_values"].float().transpose(0, 1).flatten(1), dim=1)
                     for batch in batches(context.attack, device="cpu")])
        for extreme in (torch.amin, torch.amax)
    )
    made = {}
    for name, split in splits.items():
        parts = []
        for batch in batches(split, device="cpu"):
            pixels = batch["pixel_values"].float()
            height, width = (min(side, _SIDE) for side in pixels.shape[-2:])
            small = nn.functional.adaptive_avg_pool2d(pixels, (height, width))
            colours = colour_histograms(pixels, lowest.amin(dim=0), highest.amax(dim=0))
            parts.append(torch.cat([direction_histograms(small), colours], dim=1))
        made[name] = torch.cat(parts)
    return made


REFERENCES: dict[str, Attack] = {
    "pixel_ridge": replace(ridge_probe.ATTACK, family=FAMILY),
    "hand_made_ridge": Attack(config=HandMadeRidge, run=solve_hand_made, family=FAMILY, unit="solve"),
    "pixel_network": Attack(config=PixelNetwork, run=train_network, family=FAMILY),
}
"""Run in the role ``nothing``; their best is what an attacker has anyway."""
