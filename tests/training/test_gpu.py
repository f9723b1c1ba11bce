"""One step on a CUDA device is the step of the CPU, and its objective does not wait for the device. ``-m gpu``."""

from __future__ import annotations

import contextlib

import pytest
import torch
from step_builders import objective_of, relative_error

from hf_immunize.training.core.registry import OBJECTIVES, on_features

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, torch sees none"),
]
DOUBLE = torch.float64


@pytest.fixture
def gradients_of(make_trainer, make_vit, make_pixels, keep_gradients):
    """Gradients of the last step, moved to the CPU."""

    def run(cpu: bool, dtype: torch.dtype = DOUBLE, **options):
        keeper = type(keep_gradients)()
        trainer = make_trainer(
            model=make_vit(dtype=dtype, layers=3),
            primary=make_pixels(24, dtype=dtype),
            harmful=make_pixels(40, seed=1, dtype=dtype),
            callbacks=[keeper],
            **{"max_steps": 1, "max_grad_norm": 0.0, "use_cpu": cpu, "harmful_group_rows": 9} | options,
        )
        trainer.train()
        assert trainer.args.device.type == ("cpu" if cpu else "cuda")
        return {name: value.cpu() for name, value in keeper.steps[-1].items()}

    return run


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_is_that_of_the_cpu(gradients_of, objective):
    options = {"objective": objective, "max_steps": 2}
    assert relative_error(gradients_of(False, **options), gradients_of(True, **options)) <= 1e-6


@pytest.mark.parametrize(
    "options",
    [
        {"sites": "lora", "site_weights": "q_proj=0.7"},
        {"feature_bank_rows": 30, "max_steps": 2},
        {"gradient_accumulation_steps": 3},
        {"activation_checkpointing": True, "distillation": 1.0},
        {"precondition_gradients": "layers.2.mlp.fc2"},
        {"augmentation": "flip,color", "ema_decay": 0.9, "feature_distillation": 1.0},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_do_the_same_on_both(gradients_of, options):
    options = {"objective": "closed_form_adversary"} | options
    assert relative_error(gradients_of(False, **options), gradients_of(True, **options)) <= 1e-6


def test_cached_features_train_as_on_the_cpu(gradients_of, tmp_path):
    options = {"trainable_modules": "last:1", "cache_frozen_features": True, "distillation": 1.0}
    found = {
        cpu: gradients_of(cpu, feature_cache_dir=str(tmp_path / str(cpu)), **options) for cpu in (False, True)
    }
    assert relative_error(found[False], found[True]) <= 1e-6


@pytest.mark.parametrize("objective", ["condition_number", "closed_form_adversary", "imma"])
def test_bf16_on_the_device_is_close_to_float32_on_the_cpu(gradients_of, objective):
    options = {"objective": objective, "weight": "1", "strength": 1.0, "primary_loss_weight": 1e-6}
    single = gradients_of(True, torch.float32, **options)
    assert relative_error(gradients_of(False, torch.float32, bf16=True, **options), single) <= 0.1


@contextlib.contextmanager
def _waiting_is_an_error(monkeypatch):
    """Synchronization raises, except in torch's check that a decomposition succeeded, which cannot be turned off."""

    def allowed(function):
        def run(*args, **kwargs):
            torch.cuda.set_sync_debug_mode("default")
            try:
                return function(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("error")

        return run

    for name in ("eigh", "eigvalsh", "svd", "cholesky"):
        monkeypatch.setattr(torch.linalg, name, allowed(getattr(torch.linalg, name)))
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("weight", ["1", "auto"])
@pytest.mark.parametrize("objective", [name for name, terms in OBJECTIVES.items() if on_features(terms)])
def test_the_objective_does_not_wait_for_the_device(objective, weight, monkeypatch):
    measured, micro = objective_of(objective, weight, ("head", "inner"), device="cuda")
    measured.gradients([micro], spectra=True)
    torch.cuda.synchronize()
    with _waiting_is_an_error(monkeypatch):
        measured.gradients([micro], spectra=True)


def test_waiting_is_noticed(monkeypatch):
    with _waiting_is_an_error(monkeypatch), pytest.raises(RuntimeError, match="synchroniz"):
        float(torch.ones((), device="cuda"))
