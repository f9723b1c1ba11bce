"""The utility guard holds what it promises, or says that it could not."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn

from hf_immunize.models import load_classifier, load_processor
from hf_immunize.training import ImmunizationConfig, ImmunizationTrainer
from hf_immunize.training.core.average import WeightAverage
from hf_immunize.training.core.guard import UtilityGuard
from hf_immunize.training.core.guarded import GuardedRun


def weight(value: float) -> nn.Module:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, value)
    return layer


def test_the_strength_is_halved_above_the_allowance_and_grows_with_room():
    guard = UtilityGuard(1.0, "accuracy", max_factor=2.0)
    guard.base = 90.0
    assert guard.observe(1, 88.0, 0.0, 1.0, weight(1)) == 0.5
    assert guard.observe(2, 89.9, 0.0, 0.5, weight(2)) == 0.625
    assert guard.observe(3, 89.2, 0.0, 0.625, weight(3)) == 0.625
    assert guard.observe(4, 95.0, 0.0, 1.9, weight(4)) == 2.0


def test_an_evaluation_before_the_first_step_changes_nothing():
    guard = UtilityGuard(1.0, "accuracy", max_factor=2.0)
    guard.base = 90.0
    assert guard.observe(0, 90.0, 0.5, 1.0, weight(1)) == 1.0 and not guard.history and guard.best is None


def test_the_weights_with_most_progress_within_the_allowance_are_returned():
    guard = UtilityGuard(1.0, "accuracy", 8.0)
    guard.base = 90.0
    for step, (metric, progress) in enumerate([(89.5, -1.0), (89.5, -3.0), (80.0, -9.0), (89.5, -2.0)], start=1):
        guard.observe(step, metric, progress, 1.0, weight(step))
    model = weight(0)
    assert guard.choose(model)
    assert float(model.weight) == 2.0
    record = guard.record(final=89.5)
    assert (record.returned_step, record.held, record.drop) == (2, True, 0.5)


def test_progress_within_a_twentieth_of_the_way_is_equal_and_the_later_weights_are_returned():
    guard = UtilityGuard(1.0, "accuracy", 2.0)
    guard.base = 90.0
    model = weight(0)
    for step, progress in ((1, 1.0), (2, 0.5), (3, 0.0), (4, 0.04), (5, 0.06), (6, 0.03), (7, 0.2)):
        guard.observe(step, 89.5, progress, 1.0, weight(step))
    assert guard.choose(model) and guard.best_step == 6 and guard.best_progress == 0.0
    assert torch.equal(model.state_dict()["weight"], weight(6).state_dict()["weight"])


def test_nothing_admissible_leaves_the_choice_to_the_weights_before_immunization():
    guard = UtilityGuard(1.0, "accuracy", 8.0)
    guard.base = 90.0
    guard.observe(1, 50.0, -9.0, 1.0, weight(1))
    assert not guard.choose(weight(0))
    assert guard.record(final=90.0).returned_step == 0


def test_without_an_allowance_the_guard_only_watches():
    guard = UtilityGuard(None, "accuracy", 8.0)
    guard.base = 90.0
    assert guard.observe(5, 10.0, 0.0, 1.0, weight(1)) == 1.0
    record = guard.record(final=10.0)
    assert (record.held, record.allowed, record.returned_step, record.drop) == (None, None, 5, 80.0)


def test_state_survives_a_round_trip():
    guard = UtilityGuard(1.0, "accuracy", 8.0)
    guard.base = 90.0
    guard.observe(1, 89.5, float("inf"), 1.0, weight(1))
    guard.observe(2, 89.5, -1.0, 1.0, weight(2))
    other = UtilityGuard(1.0, "accuracy", 8.0)
    other.load_state(*guard.state())
    assert (other.base, other.best_step, other.best_progress, other.history) == (90.0, 2, -1.0, guard.history)
    assert torch.equal(other.best["weight"], torch.tensor([[2.0]]))


@pytest.mark.parametrize("allowed,ruined", [(2.0, True), (100.0, False)])
def test_a_trainer_that_would_ruin_the_primary_task_returns_weights_within_the_allowance(
    make_trainer, make_vit, make_pixels, allowed, ruined
):
    primary = make_pixels(24)
    model = make_vit()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        loss = model(primary.pixel_values, labels=primary.labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = make_trainer(
        model=model,
        primary=primary,
        evaluation=primary,
        objective="ill_only",
        weight="auto",
        strength=1e4,
        learning_rate=0.5,
        max_primary_drop=allowed,
        eval_steps=1,
        max_steps=3,
        logging_nan_inf_filter=True,
    )
    trainer.train()
    record = trainer.guard_record
    assert record.base == 100.0
    assert record.held and record.drop <= allowed
    assert max(row["drop"] for row in record.history) > 2.0
    restored = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert restored is ruined and (record.returned_step == 0) is ruined


def test_a_metric_that_is_not_a_number_holds_nothing():
    guard = UtilityGuard(1.0, "accuracy", 8.0)
    guard.base = 90.0
    assert guard.observe(1, float("nan"), -5.0, 1.0, weight(1)) == 0.5
    assert not guard.choose(weight(0))


def test_weights_that_do_not_hold_when_measured_again_are_not_returned(make_trainer, make_vit, make_pixels):
    """An evaluation is one draw where it is not deterministic; the last word has the one of what is returned."""
    model = make_vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = make_trainer(model=model, evaluation=make_pixels(12), max_primary_drop=1.0, eval_steps=2, max_steps=2)
    measured = trainer.evaluate

    def evaluate(*args, metric_key_prefix="eval", **kwargs):
        metrics = measured(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        same = all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
        drop = 0.5 if metric_key_prefix == "final" and not same else 0.0
        return metrics | {f"{metric_key_prefix}_accuracy": 0.9 - drop}

    trainer.evaluate = evaluate
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert trainer.guard_record.held and trainer.guard_record.returned_step == 0


def test_a_drop_may_be_wider_while_there_are_steps_to_recover_in_but_not_the_choice():
    guard = UtilityGuard(1.0, "accuracy", 8.0)
    guard.base = 90.0
    assert guard.observe(1, 87.0, -9.0, 1.0, weight(1), ahead=0.9) == 1.0
    assert guard.observe(5, 86.9, -9.0, 1.0, weight(5), ahead=0.5) == 0.5
    assert guard.observe(6, 89.0, -1.0, 0.5, weight(6), ahead=0.4) == 0.5
    assert guard.observe(7, 89.4, -0.5, 0.5, weight(7), ahead=0.3) == 0.5
    assert guard.observe(8, 89.6, -0.1, 0.5, weight(8), ahead=0.2) == 0.625
    assert guard.observe(9, 88.9, -9.9, 0.5, weight(9), ahead=0.0) == 0.25
    model = weight(0)
    assert guard.choose(model) and float(model.weight) == 6.0


def test_a_drop_is_waited_for_only_while_the_terms_still_fall():
    """On the digits demo the term stood at 0.001 from step 120 of 400 on, the drop beyond its allowance."""
    factors = []
    for falling in (True, False):
        guard, factor = UtilityGuard(1.0, "accuracy", 8.0), 1.0
        guard.base = 90.0
        terms = [1.0, 0.5, 0.2, 0.0] if falling else [1.0, 0.02, 0.01, 0.0]
        for step, progress in enumerate(terms, start=1):
            factor = guard.observe(step, 88.2, progress, factor, weight(step), ahead=0.9)
        factors.append(factor)
    assert factors == [1.0, 0.25]


def test_terms_that_were_not_measured_buy_nothing():
    guard = UtilityGuard(1.0, "accuracy", 8.0)
    guard.base = 90.0
    assert guard.observe(1, 88.2, float("nan"), 1.0, weight(1), ahead=0.9) == 1.0, "nothing to compare with yet"
    assert guard.observe(2, 88.2, 0.5, 1.0, weight(2), ahead=0.9) == 1.0
    assert guard.observe(3, 88.2, float("nan"), 1.0, weight(3), ahead=0.9) == 0.5


def test_the_trainer_tells_the_guard_how_much_of_the_run_is_ahead(make_trainer, make_pixels, monkeypatch):
    told = []
    observe = UtilityGuard.observe

    def listen(self, step, *args, ahead=None, **kwargs):
        told.append((step, ahead))
        return observe(self, step, *args, ahead=ahead, **kwargs)

    monkeypatch.setattr(UtilityGuard, "observe", listen)
    make_trainer(evaluation=make_pixels(12), max_primary_drop=1.0, eval_steps=1, max_steps=4).train()
    assert told == [(1, 0.75), (2, 0.5), (3, 0.25), (4, 0.0)]


class Line:
    """A run whose weight is its step; every unit beyond ``free`` costs a tenth of a point."""

    factor, free = 1.0, 10.0

    def __init__(self, allowed=1.0, free=10.0):
        self.model, self.free, self.asked = weight(0.0), free, []
        self.guard = UtilityGuard(allowed, "accuracy", 8.0)
        self.guard.base = 90.0
        self.run = GuardedRun(self.guard, self, self, self.model, "max_primary_drop=1.0")

    def progress(self):
        return -self.at

    @property
    def at(self):
        return float(self.model.weight)

    def measure(self, what="eval"):
        self.asked.append(what)
        return 90.0 - 0.1 * max(self.at - self.free, 0.0)

    def train(self, *steps):
        for step in steps:
            nn.init.constant_(self.model.weight, step)
            self.run.check(step, self.measure(), last=steps[-1])
        self.asked.clear()
        return self.run.finish(self.measure)


def test_the_allowance_is_used_up_between_two_evaluations():
    """Step 10 costs nothing, step 40 three points, step 20 is where one point ends: kept is what lies just before."""
    line = Line()
    record = line.train(10, 40)
    assert (record.returned_step, record.held) == (10, True) and 0 < record.allowed - record.drop < 30 / 32 / 10
    assert line.at == 10 + 30 * record.towards_last == pytest.approx(20, abs=30 / 32)
    assert line.asked == ["between"] * 5 + ["final"]
    assert record.told_step == f"weights {100 * record.towards_last:.0f} % of the way from step 10 to step 40"


def test_where_no_evaluation_held_the_line_begins_before_immunization():
    record = (line := Line()).train(30, 40)
    assert (record.returned_step, record.held) == (0, True) and line.at == 40 * record.towards_last <= 20


@pytest.mark.parametrize("steps, allowed, free, kept", [
    ((10, 15), 1.0, 10.0, 15), ((5, 10), 1.0, 100.0, 10), ((20, 10), 0.0, 10.0, 10), ((40,), 0.0, 0.0, 0),
])
def test_weights_of_one_evaluation_are_returned_where_the_last_is_allowed_or_nothing_beyond_is(
    steps, allowed, free, kept
):
    record = (line := Line(allowed, free)).train(*steps)
    assert record.towards_last is None and (record.returned_step, line.at) == (kept, kept)
    assert record.told_step == f"weights of step {kept}"


def test_a_counter_is_not_interpolated_and_a_running_mean_is():
    norm = nn.BatchNorm1d(1)
    guard = UtilityGuard(1.0, "accuracy", 8.0)
    guard.base = 90.0
    run = GuardedRun(guard, Line(), Line(), norm, "max_primary_drop=1.0")
    with torch.no_grad():
        norm(torch.full((4, 1), 2.0))
    guard.observe(1, 0.0, -1.0, 1.0, norm)
    record = run.finish(lambda what: 90.0 - 8 * float(norm.running_mean))
    assert norm.num_batches_tracked == 1 and float(norm.running_mean) == pytest.approx(0.2 * record.towards_last)


def test_a_ruin_is_set_back_and_a_drop_that_recovers_is_not():
    """Beyond ten allowances back to the kept weights, and a quarter of the factor; not after the last step."""
    model, terms = weight(0.0), types.SimpleNamespace(factor=1.0)
    guard = UtilityGuard(1.0, "accuracy", 8.0)
    guard.base = 90.0
    run = GuardedRun(guard, types.SimpleNamespace(progress=lambda: -1.0), terms, model, "max_primary_drop=1.0")
    average = WeightAverage(model, 0.9)

    def check(step, points, value):
        with torch.no_grad():
            model.weight.fill_(value)
        run.check(step, points, last=10)
        run.set_back(model, torch.optim.AdamW(model.parameters()), average, left=10 - step)
        return terms.factor, float(model.weight.detach())

    assert check(1, 79.9, 5.0) == (0.25, 0.0)  # to where it began
    assert check(2, 89.5, 1.0) == (0.25 * 1.25, 1.0)
    assert check(3, 80.1, 6.0)[1] == 6.0  # nine points and more, but not ten: halved or waited for
    assert check(4, 20.0, 7.0)[1] == 1.0  # to the best so far
    assert float(average.mean["weight"]) == 1.0
    assert check(5, float("nan"), 8.0)[1] == 8.0
    before = terms.factor
    assert check(10, 20.0, 9.0) == (before / 4, 9.0)  # nothing is ahead: finish() chooses


def test_a_run_that_ruins_the_model_at_once_still_ends_with_something(digits_primary, digits_base, tmp_path):
    """At a hundred times the default rate and strength: with nothing set back all weights are lost for good."""
    primary, harmful, _ = digits_primary
    processor = load_processor(digits_base)
    args = ImmunizationConfig(
        str(tmp_path), objective="closed_form_adversary", learning_rate=0.01, strength=8.0, max_steps=40, use_cpu=True,
        max_primary_drop=2.0, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = ImmunizationTrainer(
        load_classifier(digits_base), args, train_dataset=primary.pixels("train", processor),
        eval_dataset=primary.pixels("validation", processor), harmful_dataset=harmful.pixels("defense", processor),
    )  # fmt: skip
    trainer.train()
    drops = [row["drop"] for row in trainer.guard_record.history]
    assert drops[0] > 20 > min(drops[1:]), drops
