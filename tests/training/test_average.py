"""The moving average of the weights against its recurrence, and what it means for what is returned."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.trainer_callback import TrainerCallback

from hf_immunize.training.core.average import WeightAverage


class KeepWeights(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: value.detach().clone() for name, value in model.named_parameters()})


def by_hand(start, steps, decay):
    mean = {name: value.clone().double() for name, value in start.items()}
    for place, step in enumerate(steps, start=1):
        rate = min(decay, (1 + place) / (10 + place))
        mean = {name: rate * mean[name] + (1 - rate) * step[name].double() for name in mean}
    return mean


def test_the_average_follows_its_recurrence_and_is_returned(make_trainer, make_vit):
    model, keeper = make_vit(), KeepWeights()
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer = make_trainer(model=model, ema_decay=0.3, learning_rate=1e-2, callbacks=[keeper])
    trainer.train()
    truth = by_hand(start, keeper.steps, 0.3)
    for name, value in trainer.model.named_parameters():
        assert torch.allclose(value.double(), truth[name], atol=1e-6), name
    assert not torch.allclose(trainer.model.classifier.weight, keeper.steps[-1]["classifier.weight"], atol=1e-5)


def test_inside_swapped_the_model_is_the_average_and_afterwards_itself():
    layer = nn.Linear(2, 2)
    average = WeightAverage(layer, 0.5)
    old = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(RuntimeError), average.swapped(layer):
        assert torch.equal(layer.weight, old)
        raise RuntimeError
    assert torch.equal(layer.weight, old + 1)


def test_half_precision_weights_are_averaged_in_float32():
    layer = nn.Linear(2, 2).to(torch.bfloat16)
    average = WeightAverage(layer, 0.999)
    assert average.mean["weight"].dtype == torch.float32
    average.update(layer)
    average.copy_to(layer)
    assert layer.weight.dtype == torch.bfloat16


def test_state_survives_a_round_trip():
    layer = nn.Linear(2, 2)
    average, other = WeightAverage(layer, 0.5), WeightAverage(nn.Linear(2, 2), 0.5)
    average.update(layer)
    other.load_state(average.state())
    assert other.count == 1 and torch.equal(other.mean["weight"], average.mean["weight"])


def test_the_guard_judges_and_returns_averaged_weights(make_trainer, make_vit, make_pixels):
    """The guard's kept weights are those of the average at that evaluation, not of the step."""
    keeper, evaluation = KeepWeights(), make_pixels(12, seed=3)
    model = make_vit()
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer = make_trainer(
        model=model, evaluation=evaluation, ema_decay=0.5, learning_rate=1e-2, max_primary_drop=100.0, eval_steps=1,
        max_steps=5, callbacks=[keeper],
    )  # fmt: skip
    trainer.train()
    step = trainer.guard_record.returned_step
    assert step > 0 and trainer.guard_record.held
    truth = by_hand(start, keeper.steps[:step], 0.5)
    for name, value in trainer.model.named_parameters():
        assert torch.allclose(value.double(), truth[name], atol=1e-6), name
