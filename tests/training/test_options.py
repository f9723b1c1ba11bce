"""Both trainers call an option by one name; names of earlier versions still work, and say so."""

from __future__ import annotations

import dataclasses

import pytest

from hf_immunize.errors import ConfigError
from hf_immunize.training import ImmunizationConfig
from hf_immunize.training.core.options import ImmunizationOptions
from hf_immunize.training.diffusion import DiffusionImmunizationConfig
from hf_immunize.training.diffusion.config import scientific_options


def test_shared_options_are_declared_once_and_mean_the_same(tmp_path):
    shared = {field.name for field in dataclasses.fields(ImmunizationOptions)}
    ours = [ImmunizationConfig(str(tmp_path), use_cpu=True), DiffusionImmunizationConfig(str(tmp_path))]
    follow_the_model = {"strength", "distillation"}  # a classifier's are open until there is one
    other = {"sites", "trainable_modules", "per_device_harmful_batch_size"} | follow_the_model
    for name in shared - other:
        assert getattr(ours[0], name) == getattr(ours[1], name), name
    assert len(shared) > 15


@pytest.mark.parametrize(
    "build,old,new",
    [
        (ImmunizationConfig, {"attacker_lora_rank": 3}, {"attacker_rank": 3}),
        (ImmunizationConfig, {"attacker_lora_rate": 0.1}, {"attacker_learning_rate": 0.1}),
        (DiffusionImmunizationConfig, {"trainable": "attention"}, {"trainable_modules": "attention"}),
        (DiffusionImmunizationConfig, {"max_loss_factor": 1.05}, {"max_primary_drop": 5.0}),
    ],
)
def test_old_names_work_and_say_what_they_are_called_now(tmp_path, build, old, new):
    plain = {"use_cpu": True} | ({"objective": "imma"} if build is ImmunizationConfig else {})
    with pytest.warns(FutureWarning, match=f"is now called {next(iter(new))}"):
        found = build(str(tmp_path), **plain, **old)
    (name, value), = new.items()
    assert getattr(found, name) == value
    if build is DiffusionImmunizationConfig:
        assert scientific_options(found) == scientific_options(build(str(tmp_path), **plain, **new))


def test_old_and_new_name_together_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="got both"):
        DiffusionImmunizationConfig(str(tmp_path), trainable="lora", trainable_modules="attention")
