"""A number of steps or epochs and nothing else set: every objective immunizes, guarded or not, and says so."""

from __future__ import annotations

import pytest

from hf_immunize import ImmunizationConfig, ImmunizationTrainer
from hf_immunize.models import load_classifier, load_processor
from hf_immunize.training.core.registry import OBJECTIVES

LENGTHS = {"steps": {"max_steps": 40}, "epochs": {"num_train_epochs": 3}}
SILENT = {"trap"}
"""Does not move at the rate that is safe (docs/objectives.md), and says NOT IMMUNIZED."""


@pytest.fixture
def digits(digits_primary, digits_base):
    primary, harmful, _ = digits_primary
    processor = load_processor(digits_base)
    return {
        "train_dataset": primary.pixels("train", processor), "eval_dataset": primary.pixels("validation", processor),
        "harmful_dataset": harmful.pixels("defense", processor),
    }


@pytest.fixture
def run(digits, digits_base, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def train(objective, length, **options):
        args = ImmunizationConfig(str(tmp_path), objective=objective, **LENGTHS[length], **options)
        trainer = ImmunizationTrainer(load_classifier(digits_base), args, **digits)
        trainer.train()
        return trainer

    return train


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("allowed", [None, 1.0])
def test_the_probe_loses_half_of_its_gain(run, length, allowed):
    trainer = run("closed_form_adversary", length, max_primary_drop=allowed)
    assert trainer.outcome.immunized, trainer.outcome.told
    assert trainer.guard_record.drop <= 1.6  # three of 192 images, where nothing guards
    assert trainer.guard_record.held is (None if allowed is None else True)


@pytest.mark.slow
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("objective", sorted(set(OBJECTIVES) - {"closed_form_adversary"}))
def test_every_objective_lowers_its_term_within_the_allowance(run, objective, length):
    trainer = run(objective, length, max_primary_drop=1.0)
    assert trainer.outcome.immunized is (objective not in SILENT), trainer.outcome.told
    assert trainer.guard_record.held
