"""G of a diffusion step is of its whole batch, however it is cut into micro-batches."""

from __future__ import annotations

import pytest
import torch

from hf_immunize.training.diffusion.references import WrongTargetGradients, wrong_target_gradients


def test_a_step_of_two_micro_batches_has_the_norms_of_their_mean(make_trainer):
    trainer = make_trainer(objective="condition_number", dtype=torch.float64)
    sites = trainer.layouts
    one, two = (trainer._batch(trainer.streams.retain, micro) for micro in (0, 1))
    joined = WrongTargetGradients(trainer.denoiser, trainer.bare, sites)
    for batch in (one, two):
        joined.add(batch)
    at_sites, at_weights = joined.norms()
    alone = [wrong_target_gradients(trainer.denoiser, trainer.bare, batch, sites) for batch in (one, two)]
    for site, norm in at_sites.items():
        parts = torch.stack([found[site] for found, _ in alone])
        assert float(norm) == pytest.approx(float(parts.square().sum().sqrt() / 2), rel=1e-12) and float(norm) > 0
    weights = [float(found) for _, found in alone]
    assert abs(weights[0] - weights[1]) / 2 <= float(at_weights) <= sum(weights) / 2
