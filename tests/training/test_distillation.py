"""Feature distillation: the formula row by row, and its gradient in a training step against plain autograd."""

from __future__ import annotations

import pytest
import torch

from hf_immunize.errors import ConfigError
from hf_immunize.training.vision.distillation import feature_distance


def test_the_distance_is_the_mean_of_rows_own_ratios():
    features = torch.tensor([[1.0, 1.0], [0.0, 3.0], [2.0, 2.0]], dtype=torch.float64)
    teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]], dtype=torch.float64)
    assert float(feature_distance(features, teacher)) == pytest.approx((1.0 + 4.0 + 0.0) / 3)
    assert float(feature_distance(7 * features, 7 * teacher)) == pytest.approx(5 / 3)
    assert float(feature_distance(torch.zeros(2, 3), torch.zeros(2, 3))) == 0.0


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_steps_gradient_is_that_of_the_formula(make_trainer, make_vit, make_pixels, keep_gradients, accumulation):
    primary = make_pixels(24, dtype=torch.float64)
    trainer = make_trainer(
        model=make_vit(dtype=torch.float64),
        primary=primary,
        harmful=make_pixels(30, seed=1, dtype=torch.float64),
        callbacks=[keep_gradients],
        objective="closed_form_adversary",
        strength=0.0,
        primary_loss_weight=0.0,
        distillation=3.0,
        feature_distillation=2.0,
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=24 // accumulation,
        max_steps=1,
        max_grad_norm=0.0,
    )

    def moved(model):
        generator = torch.Generator().manual_seed(3)
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        return model

    moved(trainer.model)  # after the teacher was copied: at the start itself both terms have no gradient
    trainer.train()
    teacher, model = make_vit(dtype=torch.float64), moved(make_vit(dtype=torch.float64))
    with torch.no_grad():
        before = teacher.vit(primary.pixel_values).last_hidden_state[:, 0]
    now = model.vit(primary.pixel_values).last_hidden_state[:, 0]
    ratio = ((now - before) ** 2).sum(1) / (before**2).sum(1)
    target = teacher.classifier(before).softmax(-1)
    divergence = (target * (target.log() - model.classifier(now).log_softmax(-1))).sum(1)
    (3.0 * divergence.mean() + 2.0 * ratio.mean()).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found = keep_gradients.steps[0][name]
            assert torch.allclose(found, parameter.grad, rtol=1e-9, atol=1e-12), name


def test_it_keeps_features_where_they_were(make_trainer, make_vit, make_pixels):
    primary = make_pixels(24)

    def distance(weight: float) -> float:
        model = make_vit()
        before = model.vit(primary.pixel_values).last_hidden_state[:, 0].detach()
        trainer = make_trainer(
            model=model, primary=primary, objective="closed_form_adversary", weight="1", strength=1.0,
            distillation=0.1, feature_distillation=weight, primary_loss_weight=0.0, max_steps=12,
        )  # fmt: skip
        trainer.train()
        return float(feature_distance(trainer.model.eval().vit(primary.pixel_values).last_hidden_state[:, 0], before))

    assert distance(10.0) < 0.5 * distance(0.0)


def test_the_default_keeps_the_primary_task_and_nothing_at_all_is_refused(make_trainer):
    make_trainer(primary_loss_weight=0.0, feature_distillation=1.0)
    with pytest.raises(ConfigError, match="something that keeps the primary task"):
        make_trainer(primary_loss_weight=0.0)
    with pytest.raises(ConfigError, match="feature_distillation"):
        make_trainer(feature_distillation=-1.0)
