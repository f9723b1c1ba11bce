"""What tests of one step share: gradients compared, and an objective with features of its own."""

from __future__ import annotations

import torch

from hf_immunize.training.core.meter import Meter
from hf_immunize.training.core.objective import GlobalObjective, MicroBatch
from hf_immunize.training.core.registry import terms_of
from hf_immunize.training.core.terms import TermSettings


def relative_error(ours: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == truth.keys()
    difference = sum(float((ours[name] - truth[name]).square().sum()) for name in truth)
    return (difference / sum(float(value.square().sum()) for value in truth.values())) ** 0.5


def objective_of(
    name: str, weight: str, sites: tuple[str, ...], device: str = "cpu"
) -> tuple[GlobalObjective, MicroBatch]:
    """An objective that is past its first measurement of θ₀, and random features for it; labels are on the CPU."""
    generator = torch.Generator().manual_seed(0)
    features = {
        side: {site: torch.randn(24, 40, generator=generator).to(device) for site in sites}
        for side in ("primary", "harmful")
    }
    labels = torch.arange(24) % 3
    objective = GlobalObjective(
        terms_of(name), TermSettings(harmful_classes=3, group_rows=9), dict.fromkeys(sites, 1.0 / len(sites)),
        weight=weight, strength=1.0, shares=None, bank_rows=48, meter=Meter(),
    )
    for weights in objective.weights.values():
        weights.reference = torch.ones((), dtype=torch.float64, device=device)
    return objective, MicroBatch(features, {"primary": labels, "harmful": labels})
