"""A trainer on tiny random images: exercises the machinery, claims nothing."""

from __future__ import annotations

import pytest
import torch
from transformers.trainer_callback import TrainerCallback

from hf_immunize.training import ImmunizationConfig, ImmunizationTrainer


class KeepGradients(TrainerCallback):
    """Copies of the gradients just before each optimizer step."""

    def __init__(self):
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


@pytest.fixture
def make_trainer(tmp_path, make_vit, make_pixels):
    def build(model=None, primary=None, harmful=None, evaluation=None, callbacks=None, **options):
        settings = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 4,
            "per_device_train_batch_size": 8,
            "per_device_harmful_batch_size": 12,
            "learning_rate": 1e-3,
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 7,
        } | options
        return ImmunizationTrainer(
            model=model if model is not None else make_vit(),
            args=ImmunizationConfig(**settings),
            train_dataset=primary if primary is not None else make_pixels(24),
            harmful_dataset=harmful if harmful is not None else make_pixels(30, seed=1),
            eval_dataset=evaluation,
            callbacks=callbacks,
        )

    return build


@pytest.fixture
def keep_gradients():
    return KeepGradients()
