"""A pipeline's training says whether it worked, on images of the concept that it has not seen where there are such."""

from __future__ import annotations

import pytest
import torch
from denoiser_builders import build_examples

from hf_immunize.errors import NotImmunizedError
from hf_immunize.stages.base import ImmunizeOptions, require_outcome


def held_out():
    return build_examples("unet", 12, seed=7, label=9)


AS_PUBLISHED = {"imma": {"trainable_modules": "attention", "attacker_rank": 2}}


@pytest.mark.parametrize("objective", ["ill_only", "group_kappa", "simulated_attack", "imma"])
def test_every_kind_of_objective_is_measured_before_and_after(make_trainer, objective):
    trainer = make_trainer(objective=objective, max_steps=2, harmful_eval_dataset=held_out(), attacker_steps=1,
                           **AS_PUBLISHED.get(objective, {}))
    trainer.train()
    found = trainer.outcome
    assert found.held_out and found.rows == 12 and found.probe_before is None and found.chance is None
    assert len(found.terms_before) >= 1 and found.terms_before.keys() == found.terms_after.keys()
    assert found.loss_before > 0 and found.loss_before != found.loss_after
    assert "denoising loss on held-out images of the concept" in found.told
    assert found.told.startswith("IMMUNIZED: " if found.immunized else "NOT IMMUNIZED: ")


def test_a_run_that_changes_nothing_is_not_immunized_and_require_leaves_with_an_error(make_trainer, capsys):
    trainer = make_trainer(objective="ill_only", max_steps=1, learning_rate=1e-12)
    trainer.train()
    assert not trainer.outcome.immunized and not trainer.outcome.held_out
    assert "NOT IMMUNIZED: " in capsys.readouterr().out and "on images of the concept" in trainer.outcome.told
    with pytest.raises(NotImmunizedError, match="asked for by require, got NOT IMMUNIZED"):
        require_outcome(ImmunizeOptions("base", require=True), trainer.outcome)
    require_outcome(ImmunizeOptions("base"), trainer.outcome)


def test_a_run_that_lowers_the_term_says_so(make_trainer):
    trainer = make_trainer(objective="ill_only", max_steps=12, learning_rate=3e-3, strength=10.0, weight="auto",
                           harmful_eval_dataset=held_out())
    trainer.train()
    assert trainer.outcome.immunized, trainer.outcome.told


@pytest.mark.parametrize("objective", ["ill_only", "imma", "simulated_attack"])
def test_looking_changes_no_weight_and_a_resumed_run_says_the_same(make_trainer, objective, tmp_path, monkeypatch):
    options = {"objective": objective, "max_steps": 4, "save_steps": 3, "attacker_steps": 1}
    options |= AS_PUBLISHED.get(objective, {})
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    resumed = make_trainer(output_dir=str(tmp_path / "again"), **options)
    resumed.train(tmp_path / "whole" / "checkpoint-3")
    assert resumed.outcome == whole.outcome
    monkeypatch.setattr(type(whole._outcome_meter), "start", lambda self, model: None)
    blind = make_trainer(output_dir=str(tmp_path / "blind"), **options)
    blind.train()
    assert blind.outcome is None
    for found in (resumed, blind):
        for name, value in whole.bare.state_dict().items():
            assert torch.equal(value, found.bare.state_dict()[name]), name
