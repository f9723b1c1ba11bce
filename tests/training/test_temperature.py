"""Distillation holds a model equally hard whatever the scale of θ₀'s logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hf_immunize.data import PixelDataset
from hf_immunize.training.vision.distillation import ROWS, SPREAD, Temperature, evenly, temperature_of
from hf_immunize.training.vision.primary import MULTI, REGRESSION, SINGLE, divergence


def told(rows: int = 60, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that know the labels, and these."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(rows) % classes
    noise = torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    return noise + 3 * nn.functional.one_hot(labels, classes), labels


@pytest.fixture
def trained(make_vit):
    """A tiny model that knows its images, and these: untrained ones have no scale to take."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(48) % 3
    images = torch.randn(48, 3, 8, 8, generator=generator, dtype=torch.float64) + labels[:, None, None, None]
    rows = PixelDataset(images, labels, ["a", "b", "c"])

    def build(factor: float = 1.0):
        model = make_vit(dtype=torch.float64)
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(30):
            optimizer.zero_grad()
            model(rows.pixel_values, labels=rows.labels).loss.backward()
            optimizer.step()
        model.zero_grad()
        model.classifier.weight.data *= factor
        model.classifier.bias.data *= factor
        return model

    return build, rows


def test_the_temperature_is_the_spread_of_centred_logits():
    logits, labels = told()
    by_hand = math.sqrt(sum(float(row.var(unbiased=False)) for row in logits) / len(logits)) / SPREAD
    assert temperature_of(logits + 7.0, labels, SINGLE) == pytest.approx(by_hand)
    assert temperature_of(logits, labels, MULTI) == pytest.approx(float(logits.pow(2).mean().sqrt()) / SPREAD)
    assert temperature_of(logits + 7.0, labels, REGRESSION) == pytest.approx(
        math.sqrt(float(logits.var(dim=0, unbiased=False).mean()))
    )


@pytest.mark.parametrize("kind", [SINGLE, MULTI, REGRESSION])
def test_a_head_ten_times_as_large_pulls_equally_hard_at_the_features(kind):
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(60, 8, generator=generator, dtype=torch.float64)
    labels = base[:, :5].argmax(dim=1)
    weight = torch.eye(5, 8, dtype=torch.float64)
    moved = base + 0.3 * torch.randn(60, 8, generator=generator, dtype=torch.float64)

    def pull(factor: float) -> tuple[float, torch.Tensor, torch.Tensor]:
        features, head = moved.clone().requires_grad_(), (factor * weight).requires_grad_()
        target = base @ (factor * weight).T
        value = divergence(features @ head.T, target, kind, temperature_of(target, labels, kind))
        return value.item(), *torch.autograd.grad(value, [features, head])

    (one, at_features, at_head), (ten, also, at_large) = pull(1.0), pull(10.0)
    assert one == pytest.approx(ten, rel=1e-12) and one > 1e-3
    assert torch.allclose(at_features, also, rtol=1e-10, atol=1e-15)
    assert torch.allclose(at_head, 10 * at_large, rtol=1e-10, atol=1e-15)


def test_logits_that_say_nothing_of_the_labels_have_no_scale():
    logits, labels = told()
    assert temperature_of(50 * logits, labels.roll(1), SINGLE) == 1.0
    assert temperature_of(torch.zeros(60, 5), labels, SINGLE) == 1.0
    assert temperature_of(torch.full((60, 1), 3.0), labels, REGRESSION) == 1.0


def test_a_step_of_training_does_not_see_the_scale_of_the_head(make_trainer, keep_gradients, trained):
    build, rows = trained
    found = {}
    for factor in (1.0, 10.0):
        keep_gradients.steps.clear()
        trainer = make_trainer(
            model=build(factor), primary=rows, callbacks=[keep_gradients], objective="closed_form_adversary",
            harmful=rows, strength=0.0, primary_loss_weight=0.0, distillation=3.0, max_steps=1, max_grad_norm=0.0,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(3)
        for name, parameter in trainer.model.named_parameters():
            moved = 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data += factor * moved if name.startswith("classifier") else moved
        trainer.temperature.measure(trainer.teacher(rows.pixel_values).logits, rows.labels, SINGLE)
        trainer._measure_temperature = lambda: None  # the model has moved already; θ₀ is the teacher
        trainer.train()
        found[factor] = dict(keep_gradients.steps[0])
    assert max(float(value.abs().max()) for value in found[1.0].values()) > 1e-4
    for name, value in found[1.0].items():
        same = found[10.0][name] * (10 if name.startswith("classifier") else 1)
        assert torch.allclose(value, same, rtol=1e-8, atol=1e-12), name


@pytest.mark.parametrize("options", [{}, {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}])
def test_it_is_measured_once_on_the_model_of_before_and_no_batch_decides_it(make_trainer, trained, options):
    build, rows = trained
    trainer = make_trainer(model=build(), primary=rows, harmful=rows, distillation=1.0, learning_rate=0.1, **options)
    trainer.train()
    assert trainer.temperature.value == pytest.approx(temperature_of(build()(rows.pixel_values).logits, rows.labels,
                                                                     SINGLE), rel=1e-12)  # fmt: skip
    assert trainer.temperature.value != 1.0


def test_a_cached_run_measures_the_same(make_trainer, trained, tmp_path):
    build, rows = trained
    options = {"trainable_modules": "last:1", "cache_frozen_features": True, "feature_cache_dir": str(tmp_path / "c")}
    trainer = make_trainer(model=build(), primary=rows, harmful=rows, distillation=1.0, max_steps=1, **options)
    trainer.train()
    expected = temperature_of(build()(rows.pixel_values).logits, rows.labels, SINGLE)
    assert trainer.temperature.value == pytest.approx(expected, rel=1e-6)


def test_its_state_survives_a_round_trip_and_the_checkpoint_holds_it(make_trainer, trained, tmp_path):
    build, rows = trained
    options = {"primary": rows, "harmful": rows, "distillation": 1.0, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(model=build(), max_steps=2, **options)
    trainer.train()
    resumed = make_trainer(model=build(), max_steps=3, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert resumed.temperature.value == trainer.temperature.value != 1.0
    with pytest.raises(KeyError):
        Temperature().load_state({})


class Stream(torch.utils.data.IterableDataset):
    """Rows that have no places."""

    def __iter__(self):
        return ({"pixel_values": torch.zeros(3, 8, 8), "labels": number} for number in range(10))


def test_rows_are_taken_at_equal_distances_or_from_the_start():
    assert [int(row) for row in evenly(torch.arange(10), 4)] == [0, 2, 5, 7]
    assert len(evenly(torch.arange(10), ROWS)) == 10
    assert [row["labels"] for row in evenly(Stream(), 3)] == [0, 1, 2]
