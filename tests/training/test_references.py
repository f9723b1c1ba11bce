"""G, the reference of auto weights, is of a step's batch, however it is cut into micro-batches."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize("accumulation", [2, 3, 6])
def test_auto_weights_do_not_depend_on_accumulation(make_trainer, make_vit, make_pixels, accumulation):
    """Before: 24x1 gave half of the reference of 6x4, and with it half of lambda."""

    def lambdas(cut):
        trainer = make_trainer(
            model=make_vit(dtype=torch.float64), primary=make_pixels(48, dtype=torch.float64),
            harmful=make_pixels(30, seed=1, dtype=torch.float64), objective="condition_number", weight="auto",
            gradient_accumulation_steps=cut, per_device_train_batch_size=24 // cut,
            per_device_harmful_batch_size=24, max_steps=1,
        )
        trainer.train()
        (weights,) = trainer.objective.weights.values()
        return float(weights.reference)

    assert lambdas(accumulation) == pytest.approx(lambdas(1), rel=1e-10)
