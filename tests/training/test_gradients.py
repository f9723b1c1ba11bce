"""The step's gradient against plain autograd through one large batch, without hooks, planning or injection."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from equality import depth, units_apart
from torch.nn import functional

from hf_immunize.data import StepBatchSampler
from hf_immunize.linalg import second_moment_spectrum
from hf_immunize.regularizers import closed_form_adversary, ill_conditioned, log_condition, well_conditioned
from hf_immunize.training.vision.forwards import Forwards


def by_hand(model, primary_rows, harmful_rows, objective: str) -> dict[str, torch.Tensor]:
    """Gradient of mean cross-entropy + terms, written from the formulas."""
    model.zero_grad()
    phi_p = model.vit(primary_rows["pixel_values"]).last_hidden_state[:, 0]
    phi_h = model.vit(harmful_rows["pixel_values"]).last_hidden_state[:, 0]
    loss = functional.cross_entropy(model.classifier(phi_p), primary_rows["labels"])
    primary, harmful = second_moment_spectrum(phi_p), second_moment_spectrum(phi_h)
    adversary = partial(closed_form_adversary, phi_h, harmful_rows["labels"], horizon=100.0, memorization=0.5)
    loss = loss + {
        "condition_number": lambda: ill_conditioned(harmful) + well_conditioned(primary),
        "ill_only": lambda: ill_conditioned(harmful),
        "opt_kappa": lambda: log_condition(primary) - log_condition(harmful),
        "closed_form_adversary": adversary,
        "ill_only+closed_form_adversary": lambda: ill_conditioned(harmful) + adversary(),
    }[objective]()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative_error(ours: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == truth.keys()
    difference = sum(float((ours[name] - truth[name]).square().sum()) for name in truth)
    return (difference / sum(float(value.square().sum()) for value in truth.values())) ** 0.5


def stack(dataset, rows) -> dict[str, torch.Tensor]:
    rows = torch.as_tensor(rows)
    return {"pixel_values": dataset.pixel_values[rows], "labels": dataset.labels[rows]}


OBJECTIVES = ["condition_number", "ill_only", "opt_kappa", "closed_form_adversary", "ill_only+closed_form_adversary"]


@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_gradient_of_one_step_is_that_of_one_large_batch(
    make_trainer, make_vit, make_pixels, keep_gradients, objective, accumulation
):
    primary, harmful = make_pixels(24, dtype=torch.float64), make_pixels(30, seed=1, dtype=torch.float64)
    trainer = make_trainer(
        model=make_vit(dtype=torch.float64),
        primary=primary,
        harmful=harmful,
        callbacks=[keep_gradients],
        objective=objective,
        horizon="100",
        weight="1",
        strength=1.0,
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=24 // accumulation,
        max_steps=1,
        max_grad_norm=0.0,
        data_seed=5,
    )
    trainer.train()
    sampler = StepBatchSampler(harmful.labels.tolist(), 12 * accumulation, seed=5)
    rows = sampler.global_batch(0)
    # All 24 primary rows are in the step, so that their order does not matter.
    truth = by_hand(make_vit(dtype=torch.float64), stack(primary, range(24)), stack(harmful, rows), objective)
    assert relative_error(keep_gradients.steps[0], truth) < 1e-10


def test_accumulating_with_dropout_uses_the_same_masks_in_both_passes(
    make_trainer, make_vit, keep_gradients, monkeypatch
):
    seen, measured = [], Forwards.measured

    def watch(self, caught, inputs):
        seen.extend(caught[side]["classifier"].detach().clone() for side in ("primary", "harmful"))
        return measured(self, caught, inputs)

    monkeypatch.setattr(Forwards, "measured", watch)
    trainer = make_trainer(
        model=make_vit(dropout=0.3), gradient_accumulation_steps=2, max_steps=1, callbacks=[keep_gradients]
    )
    trainer.train()
    assert len(seen) == 8  # primary and harmful of two micro-batches, in two passes
    for first, second in zip(seen[:4], seen[4:], strict=True):  # without and with gradients: other paths, same draws
        assert units_apart(first, second) <= depth(trainer.model)
    assert units_apart(seen[1], seen[3]) > 1e4


def test_the_reported_loss_is_the_primary_loss_and_not_scaled_by_accumulation(make_trainer, make_vit, make_pixels):
    """The stock Trainer multiplies the loss of models that accept loss kwargs; ours must not."""
    data, losses = make_pixels(24), {}
    for accumulation in (1, 3):
        trainer = make_trainer(
            model=make_vit(),
            primary=data,
            gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=24 // accumulation,
            max_steps=1,
            strength=0.0,
        )
        trainer.train()
        losses[accumulation] = next(row["loss"] for row in trainer.state.log_history if "loss" in row)
    with torch.no_grad():
        truth = float(functional.cross_entropy(make_vit()(data.pixel_values).logits, data.labels))
    assert losses[1] == pytest.approx(truth, rel=1e-3) and losses[3] == pytest.approx(truth, rel=1e-3)


def test_without_the_cure_the_stock_trainer_scales_the_loss(make_trainer, make_pixels, keep_gradients, tmp_path):
    """Shows that the test above would fail: the same gradients, three times as large, when the cure is undone."""
    from transformers import ResNetConfig, ResNetForImageClassification

    def gradient(cured: bool) -> float:
        torch.manual_seed(0)
        model = ResNetForImageClassification(
            ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=3)
        )
        keeper = type(keep_gradients)()
        trainer = make_trainer(
            model=model,
            primary=make_pixels(24),
            gradient_accumulation_steps=3,
            max_steps=1,
            strength=0.0,
            max_grad_norm=0.0,
            callbacks=[keeper],
        )
        if not cured:
            trainer.model_accepts_loss_kwargs, trainer.loss_is_scaled_for_ga = True, None
        trainer.train()
        return sum(float(value.square().sum()) for value in keeper.steps[0].values()) ** 0.5

    assert gradient(cured=False) == pytest.approx(3 * gradient(cured=True), rel=1e-2)


def test_harmful_rows_never_touch_batch_norm_statistics(make_trainer, make_pixels):
    from transformers import ResNetConfig, ResNetForImageClassification

    def statistics(frozen: bool, harmful_scale: float) -> torch.Tensor:
        torch.manual_seed(0)
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=3)
        model = ResNetForImageClassification(config)
        harmful = make_pixels(30, seed=1)
        harmful.pixel_values *= harmful_scale
        trainer = make_trainer(
            model=model,
            harmful=harmful,
            freeze_norm_statistics=frozen,
            learning_rate=0.0,
            gradient_accumulation_steps=2,
        )
        trainer.train()
        return torch.cat([buffer.flatten() for name, buffer in model.named_buffers() if "running" in name])

    untouched = statistics(frozen=True, harmful_scale=1.0)
    learned = statistics(frozen=False, harmful_scale=1.0)
    assert not torch.equal(untouched, learned)
    assert torch.equal(learned, statistics(frozen=False, harmful_scale=50.0))
    assert torch.equal(untouched, statistics(frozen=True, harmful_scale=50.0))
