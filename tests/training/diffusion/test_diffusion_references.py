"""λ of auto weights of a diffusion step is of its whole batch, however it is cut into micro-batches."""

from __future__ import annotations

import pytest
import torch

from hf_immunize.training.diffusion.references import wrong_target_gradients


def test_the_norms_of_a_step_of_two_micro_batches_are_those_of_both_together(make_trainer):
    trainer = make_trainer(objective="condition_number", dtype=torch.float64)
    whole = trainer._batch(trainer.streams.retain, 0)
    cut = wrong_target_gradients(trainer.denoiser, trainer.bare, whole.split(len(whole.noisy) // 2), trainer.layouts)
    at_sites, at_weights = wrong_target_gradients(trainer.denoiser, trainer.bare, [whole], trainer.layouts)
    assert float(cut[1]) == pytest.approx(float(at_weights), rel=1e-12)
    assert {name: float(norm) for name, norm in cut[0].items()} == pytest.approx(
        {name: float(norm) for name, norm in at_sites.items()}, rel=1e-12) and min(at_sites.values()) > 0


@pytest.mark.parametrize("objective", ["condition_number", "ill_only", "simulated_attack"])
def test_auto_weights_do_not_depend_on_accumulation(make_trainer, objective):
    def lambdas(cut):
        trainer = make_trainer(
            objective=objective, dtype=torch.float64, gradient_accumulation_steps=cut, weight="auto", max_steps=2,
            per_device_train_batch_size=8 // cut, per_device_harmful_batch_size=8 // cut, logging_steps=1,
            attacker_steps=2, attacker_renamed=0.25,
        )
        trainer.train()
        return [value for row in trainer.log_history for name, value in row.items() if name.startswith("lambda/")]

    whole = lambdas(1)
    assert len(whole) >= 2 and lambdas(4) == pytest.approx(whole, rel=1e-9)
