"""The utility guard holds what it promises, or says that it could not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_immunize.training.core.guard import UtilityGuard


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


def test_the_trainer_tells_the_guard_how_much_of_the_run_is_ahead(make_trainer, make_pixels, monkeypatch):
    told = []
    observe = UtilityGuard.observe

    def listen(self, step, *args, ahead=None, **kwargs):
        told.append((step, ahead))
        return observe(self, step, *args, ahead=ahead, **kwargs)

    monkeypatch.setattr(UtilityGuard, "observe", listen)
    make_trainer(evaluation=make_pixels(12), max_primary_drop=1.0, eval_steps=1, max_steps=4).train()
    assert told == [(1, 0.75), (2, 0.5), (3, 0.25), (4, 0.0)]
