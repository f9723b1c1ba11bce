"""λ of auto weights is of a step's whole batch, however it is cut into micro-batches."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize("objective", ["condition_number", "simulated_attack", "r_ill_only"])
@pytest.mark.parametrize("accumulation", [2, 4, 6])
def test_auto_weights_do_not_depend_on_accumulation(make_trainer, make_vit, make_pixels, accumulation, objective):
    """Before: 24x1 gave half of the reference of 6x4, and with it half of lambda; then other harmful rows."""

    def lambdas(cut):
        trainer = make_trainer(
            model=make_vit(dtype=torch.float64), primary=make_pixels(48, dtype=torch.float64),
            harmful=make_pixels(30, seed=1, dtype=torch.float64), weight="auto", max_steps=2,
            objective="ill_only" if objective == "r_ill_only" else objective,
            gradient_accumulation_steps=cut, per_device_train_batch_size=24 // cut,
            per_device_harmful_batch_size=24 // cut, logging_steps=1, attacker_steps=2,
        )
        trainer.train()
        return [value for row in trainer.state.log_history for name, value in row.items() if name.startswith("lambda/")]

    whole = lambdas(1)
    assert len(whole) >= 2 and lambdas(accumulation) == pytest.approx(whole, rel=1e-9)
