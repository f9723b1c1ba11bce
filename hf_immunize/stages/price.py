"""What an exam of one model costs, told before it starts: runs, steps, operations, time and disk."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_immunize.attacks import AttackContext, Run, count_runs, plan_runs
from hf_immunize.attacks.core.plan import find_attack, is_searchable
from hf_immunize.attacks.vision._cost import BACKWARD, forward_flops

_TRACE = 6_000
"""Bytes of a trace file, about."""
_TIMED = 8
"""Images on which a forward and a backward are timed."""


@dataclass(frozen=True)
class Price:
    """What is asked for at least, and how many times as much it may become."""

    runs: int
    steps: int
    images: int
    """Trained on, repetitions counted, by attacks that train the network."""
    most: int
    """Largest budget in units of the one asked for."""

    @classmethod
    def of(cls, plan: Any) -> Price:
        """From an ``AttackPlan``: probes count as runs alone, since they train on features that are made once."""
        runs = steps = images = 0
        for name in plan.names:
            attack = find_attack(name, plan.table)
            planned = plan_runs(attack, plan.seeds, plan.settings.get(name), plan.trials)
            count = count_runs(attack, planned, plan.seeds, plan.tuning)
            runs += count
            if is_searchable(attack):
                steps += round(count * _mean(planned, "steps"))
                images += round(count * sum(_images(run) for run in planned) / len(planned))
        grows = plan.adapting and plan.follows and plan.protocol.adaptation
        return cls(runs, steps, images, plan.protocol.adaptation.most if grows else 1)

    def told(self, context: Any) -> str:
        """In one line; operations and time for classifiers, whose network is timed on a few images."""
        text = f"{self.runs} runs at least, {self.steps:,} steps of attacks that train the network"
        if isinstance(context, AttackContext) and context.role != "nothing" and self.images and len(context.attack):
            flops, seconds = _measured(context)
            text += f" on {self.images:,} images"
            text += "" if flops is None else f", about {flops * self.images:.1e} operations"
            text += f", {_shown(seconds * self.images)} on this device"
        text += f", {self.runs * _TRACE / 1e6:.1f} MB of traces"
        if self.most > 1:
            text += f"; where the base is slow, budgets grow up to {self.most} times (--adapt false: they do not)"
        return text


def _images(run: Run) -> int:
    return int(getattr(run.config, "steps", 0)) * int(getattr(run.config, "batch_size", 0))


def _mean(runs: Sequence[Run], name: str) -> float:
    return sum(getattr(run.config, name, 0) for run in runs) / max(len(runs), 1)


def _measured(context: AttackContext) -> tuple[float | None, float]:
    """Operations of training on one image, and seconds."""
    model, shape = context.model(0), context.attack.image_shape
    flops = forward_flops(model, shape)
    model.train()
    pixels = torch.zeros(_TIMED, *shape, device=context.device)
    took = []
    for _ in range(2):  # the first one also prepares
        start = time.perf_counter()
        model(pixel_values=pixels).logits.float().square().mean().backward()
        if pixels.is_cuda:
            torch.cuda.synchronize()
        took.append(time.perf_counter() - start)
    return None if flops is None else BACKWARD * flops, min(took) / _TIMED


def _shown(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{max(1, round(seconds / 60))} minutes"
