"""A pipeline's training says whether it worked, on images of the concept that it has not seen where there are such."""

from __future__ import annotations

import math

import pytest
import torch
from denoiser_builders import build_examples

from hf_immunize.errors import NotImmunizedError
from hf_immunize.records import UtilityGuardRecord
from hf_immunize.stages.base import ImmunizeOptions, require_outcome
from hf_immunize.training.diffusion.outcome import Seen, at_same_sites, kept_of


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
    assert "denoising loss on 12 held-out images of the concept" in found.told
    assert found.told.startswith("IMMUNIZED: " if found.immunized else "NOT IMMUNIZED: ")


def test_a_run_that_changes_nothing_is_not_immunized_and_require_leaves_with_an_error(make_trainer, capsys):
    trainer = make_trainer(objective="ill_only", max_steps=1, learning_rate=1e-12)
    trainer.train()
    assert not trainer.outcome.immunized and not trainer.outcome.held_out
    assert "NOT IMMUNIZED: " in capsys.readouterr().out
    assert "on 12 images of the concept it was trained on" in trainer.outcome.told
    with pytest.raises(NotImmunizedError, match="asked for by require, got NOT IMMUNIZED"):
        require_outcome(ImmunizeOptions("base", require=True), trainer.outcome)
    require_outcome(ImmunizeOptions("base"), trainer.outcome)


def test_a_run_that_lowers_the_term_says_so(make_trainer):
    trainer = make_trainer(objective="ill_only", max_steps=12, learning_rate=3e-3, strength=10.0, weight="auto",
                           harmful_eval_dataset=held_out())
    trainer.train()
    assert trainer.outcome.immunized, trainer.outcome.told


@pytest.mark.parametrize("objective", ["esd", "meta_unlearning"])
@pytest.mark.parametrize("loss, immunized", [(0.0, True), (1e9, False)])
def test_a_concept_that_is_denoised_better_than_before_was_not_erased(make_trainer, objective, loss, immunized):
    trainer = make_trainer(objective=objective, max_steps=1)
    trainer.train()
    meter = trainer._outcome_meter
    meter.before = Seen({name: 1e9 for name in meter.before.terms}, loss)  # the term fell, whatever it is now
    found = meter.record(trainer.bare)
    assert found.immunized is immunized and "simulated; one with" not in found.told


def test_a_term_is_compared_at_the_sites_where_it_is_defined_both_times():
    """A site whose features collapsed drops out of both sums, not of one."""
    before = Seen({"kappa": -12.0, "attack": 0.5}, 1.0, {"kappa": {"a": -5.0, "b": -7.0}})
    after = Seen({"kappa": -5.0, "attack": 0.4}, 1.0, {"kappa": {"a": -5.0}})
    assert at_same_sites(before, after) == ({"kappa": -5.0, "attack": 0.5}, {"kappa": -5.0, "attack": 0.4})
    gone = Seen({"attack": 0.4}, 1.0)
    assert at_same_sites(before, gone) == ({"attack": 0.5}, {"attack": 0.4})


def guarded(base: float, final: float, allowed: float | None) -> UtilityGuardRecord:
    points = [-100 * math.log(loss) for loss in (base, final)]
    return UtilityGuardRecord(metric="retain", base=points[0], final=points[1], drop=points[0] - points[1],
                              allowed=allowed, held=None, returned_step=0, history=[])


def test_a_retain_loss_that_grew_by_more_than_a_quarter_is_no_success_where_nothing_was_allowed():
    assert kept_of(None).told == "" and not kept_of(None).gone
    assert kept_of(guarded(0.06, 0.086, None)).gone and not kept_of(guarded(0.06, 0.07, None)).gone
    assert not kept_of(guarded(0.06, 0.086, 50.0)).gone, "the guard has the word"
    assert kept_of(guarded(0.06, 0.086, None)).told == "retain loss 0.06 -> 0.086"


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
