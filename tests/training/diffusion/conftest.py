"""A diffusion trainer on tiny random examples: exercises the machinery, claims nothing."""

from __future__ import annotations

import pytest
from denoiser_builders import FAMILIES, build_denoiser, build_examples, build_scheduler

from hf_immunize.training.diffusion import DiffusionImmunizationConfig, DiffusionImmunizationTrainer


@pytest.fixture(params=sorted(FAMILIES))
def family(request):
    return request.param


@pytest.fixture
def make_trainer(tmp_path):
    def build(
        family="unet", model=None, train=None, harmful=None, evaluation=None, scheduler=None, dtype=None, **options
    ):
        kind = {} if dtype is None else {"dtype": dtype}
        hooks = {name: options.pop(name) for name in ("validate", "before_update", "harmful_eval_dataset",
                                                      "null_conditions") if name in options}
        settings = {
            "output_dir": str(tmp_path / "run"), "max_steps": 3, "per_device_train_batch_size": 6,
            "per_device_harmful_batch_size": 8, "learning_rate": 1e-3, "logging_steps": 1, "use_cpu": True,
            "disable_progress": True, "seed": 7,
        } | options
        return DiffusionImmunizationTrainer(
            model if model is not None else build_denoiser(family, **kind),
            scheduler or build_scheduler(family),
            DiffusionImmunizationConfig(**settings),
            train_dataset=train if train is not None else build_examples(family, 16, **kind),
            harmful_dataset=harmful if harmful is not None else build_examples(family, 12, seed=1, label=9, **kind),
            eval_dataset=evaluation,
            **hooks,
        )

    return build
