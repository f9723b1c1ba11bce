"""What the guard compares is a share of 0..1 that is there; without a guard nothing depends on it."""

from __future__ import annotations

import math

import pytest
import torch

from hf_immunize.errors import ConfigError
from hf_immunize.training import ImmunizationConfig, ImmunizationTrainer
from hf_immunize.training.core.guard import UtilityGuard
from hf_immunize.training.core.guarded import GuardedRun


@pytest.fixture
def build(tmp_path, make_vit, make_pixels):
    def made(metrics=None, evaluation=None, **options):
        settings = {"max_steps": 2, "per_device_train_batch_size": 8, "per_device_harmful_batch_size": 12,
                    "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
        return ImmunizationTrainer(
            make_vit(), ImmunizationConfig(str(tmp_path / "run"), **settings | options), train_dataset=make_pixels(24),
            harmful_dataset=make_pixels(30, seed=1), compute_metrics=metrics,
            eval_dataset=evaluation or make_pixels(12, seed=2),
        )

    return made


@pytest.mark.parametrize("value,told", [
    (math.nan, r"a finite 'f1' of the model before immunization, got nan.*Mend compute_metrics"),
    (92.0, r"a share of 0\.\.1 as 'f1' of the model before immunization, got 92.*Divide a percentage by 100"),
])
def test_a_base_that_no_drop_can_be_told_from_stops_before_training(build, value, told):
    trainer = build(lambda _: {"f1": value}, max_primary_drop=1.0, guard_metric="f1")
    with pytest.raises(ConfigError, match=told):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("metric", ["loss", "near_loss", "RMSE", "error"])
def test_a_loss_guards_nothing(build, metric):
    with pytest.raises(ConfigError, match=f"of which more is better, got '{metric}'"):
        build(max_primary_drop=1.0, guard_metric=metric)


def test_without_a_guard_a_metric_of_ones_own_is_not_asked_for(build, make_pixels, caplog):
    for words in ({"metrics": lambda _: {"f1": 0.5}}, {"metrics": lambda _: {"accuracy": math.nan}},
                  {"evaluation": {"near": make_pixels(12, seed=2), "far": make_pixels(12, seed=3)}}):
        trainer = build(**words)
        trainer.train()
        assert trainer.state.global_step == 2 and trainer.guard_record is None and trainer.saved_step == 2
    assert caplog.text.count("The primary metric is not watched") == 3
    trainer = build(lambda _: {"f1": 0.5}, guard_metric="f1")
    trainer.train()
    assert (trainer.guard_record.base, trainer.guard_record.held) == (50.0, None)


def test_a_metric_that_stops_being_a_number_costs_no_run(build, caplog):
    seen = []

    def metrics(_):
        seen.append(1)
        return {"f1": 0.5 if len(seen) == 1 else math.nan}

    trainer = build(metrics, guard_metric="f1")
    trainer.train()
    assert trainer.guard_record is None and "f1 of the trained weights is nan" in caplog.text
    seen.clear()
    trainer = build(metrics, guard_metric="f1", max_primary_drop=1.0)
    trainer.train()
    record = trainer.guard_record
    assert (record.returned_step, record.final, record.held) == (0, 50.0, True)


def test_a_guarded_run_without_a_finite_end_gives_back_what_was_there_before():
    class Nothing:
        factor = 1.0

        def progress(self):
            return 0.0

    part = torch.nn.Linear(1, 1)
    run = GuardedRun(UtilityGuard(1.0, "f1", 2.0), Nothing(), Nothing(), part, "max_primary_drop=1")
    before = part.weight.detach().clone()
    run.guard.base = 90.0
    torch.nn.init.constant_(part.weight, 7.0)
    record = run.finish(lambda what: math.nan)
    assert torch.equal(part.weight, before) and record.final == 90.0 and record.held
