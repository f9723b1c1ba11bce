"""Terms that have no value before or after training leave a run without a verdict, and never cost it."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import TrainerCallback

from hf_immunize.errors import SpectrumError
from hf_immunize.training import ImmunizationConfig, ImmunizationTrainer
from hf_immunize.training.core.status import defined


@pytest.fixture
def make(make_vit, make_pixels, tmp_path):
    def made(held=None, **options):
        settings = {"max_steps": 2, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
                    "per_device_train_batch_size": 8, "per_device_harmful_batch_size": 12}
        return ImmunizationTrainer(
            make_vit(), ImmunizationConfig(str(tmp_path / "run"), **settings | options), train_dataset=make_pixels(24),
            harmful_dataset=make_pixels(30, seed=1), harmful_eval_dataset=held,
        )

    return made


@pytest.mark.parametrize("objective", ["condition_number", "ill_only", "opt_kappa", "group_kappa"])
def test_one_held_out_row_has_no_verdict_and_costs_no_run(make, make_pixels, objective):
    trainer = make([dict(make_pixels(3)[0])], objective=objective)
    trainer.train()
    assert trainer.state.global_step == 2 and trainer.outcome is None


class Collapse(TrainerCallback):
    """The last step makes all features one point."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == args.max_steps:
            torch.nn.init.zeros_(model.vit.layernorm.weight)
            torch.nn.init.zeros_(model.vit.layernorm.bias)


def test_features_that_have_collapsed_in_the_end_have_no_verdict_and_cost_no_run(make, caplog, tmp_path):
    trainer = make(objective="opt_kappa")
    trainer.add_callback(Collapse())
    trainer.train()
    assert trainer.outcome is None and "NOT MEASURED: whether it worked cannot be said. expected rows" in caplog.text
    trainer.save_model(str(tmp_path / "kept"))
    assert (tmp_path / "kept" / "model.safetensors").is_file()


def test_a_value_that_is_none_names_its_term():
    assert defined("term", 2.0) == 2.0
    for value in (math.nan, math.inf):
        with pytest.raises(SpectrumError, match="expected rows on which term has a value, got (nan|inf): .*different"):
            defined("term", value)
