"""Every wrong input is refused before training, with what to do about it."""

from __future__ import annotations

import pytest
import torch
from transformers import ViTModel

from hf_immunize.data import PixelDataset
from hf_immunize.errors import ConfigError, DataError, ModelError, TrainingDivergedError
from hf_immunize.training import ImmunizationConfig, ImmunizationTrainer, Term, register_objective
from hf_immunize.training.core.balancing import TermWeights
from hf_immunize.training.core.registry import OBJECTIVES, terms_of


class Rows(list):
    """A plain map-style dataset."""


def row(size: int = 8, label: int = 0, value: float = 0.0) -> dict:
    return {"pixel_values": torch.full((3, size, size), value), "labels": label}


@pytest.mark.parametrize(
    "harmful,message",
    [
        (Rows(), "at least one row in harmful_dataset"),
        (Rows([{"labels": 0}, {"labels": 1}]), "expected a 'pixel_values' column in harmful_dataset"),
        (Rows([{"pixel_values": torch.zeros(3, 8, 8)}]), "expected a 'labels' column in harmful_dataset"),
        (Rows([row(16, label % 2) for label in range(8)]), "harmful images of the primary images' size"),
        (Rows([row(label=0) for _ in range(8)]), "at least two classes in harmful_dataset"),
        (Rows([row(label=-1 + 2 * (i % 2)) for i in range(8)]), "expected labels in 0..1 in harmful_dataset, got -1"),
    ],
    ids=["empty", "no image column", "no label column", "other size", "one class", "negative label"],
)
def test_a_harmful_dataset_that_cannot_be_used(make_trainer, harmful, message):
    with pytest.raises(DataError, match=message):
        make_trainer(harmful=harmful, objective="closed_form_adversary")


def test_a_missing_dataset_is_named(make_vit, make_pixels, tmp_path):
    args = ImmunizationConfig(str(tmp_path), use_cpu=True)
    with pytest.raises(DataError, match="got no harmful_dataset"):
        ImmunizationTrainer(make_vit(), args, train_dataset=make_pixels())


def test_nan_pixels_are_refused(make_trainer, make_pixels):
    with pytest.raises(DataError, match="finite pixels"):
        PixelDataset(torch.full((2, 3, 8, 8), float("nan")), torch.tensor([0, 1]), ["a", "b"])
    rows = Rows([row(label=i % 2, value=float(i)) for i in range(24)])
    rows[3]["pixel_values"][0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="finite pixels"):
        make_trainer(harmful=rows, max_steps=20).train()


def test_primary_labels_outside_the_heads_range(make_trainer, make_vit):
    with pytest.raises(DataError, match="expected labels in 0..1 in train_dataset, got 2 in row 2"):
        make_trainer(model=make_vit(labels=2))


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_harmful_batch_too_small_for_two_of_each_class(make_trainer, rows):
    with pytest.raises(DataError, match="raise per_device_harmful_batch_size"):
        make_trainer(per_device_harmful_batch_size=rows)


def test_a_primary_batch_of_one_stops_with_its_reason(make_trainer):
    with pytest.raises(TrainingDivergedError, match="expected finite losses and spectra"):
        make_trainer(per_device_train_batch_size=1, objective="opt_kappa").train()


@pytest.mark.parametrize("labels,value,told", [
    (3, [0.0, 1.0, 0.0], r"one class in each row of train_dataset for problem_type=None, got 3 numbers in row 0: set "
     r"model.config.problem_type='multi_label_classification' for labels of 0 and 1, or 'regression'"),
    (1, 2.5, r"a head of at least two outputs for problem_type=None, got one, with the label 2.5 in row 0 of "
     r"train_dataset: set model.config.problem_type='regression'"),
], ids=["vectors", "numbers"])  # fmt: skip
def test_labels_that_are_no_classes_say_how_to_declare_them(make_trainer, make_vit, labels, value, told):
    rows = Rows([row() | {"labels": value} for _ in range(12)])
    with pytest.raises(DataError, match=told):
        make_trainer(make_vit(labels=labels), primary=rows)
    tensors = Rows([one | {"labels": torch.tensor(one["labels"])} for one in rows])
    with pytest.raises(DataError, match=told):
        make_trainer(make_vit(labels=labels), primary=tensors)


def test_a_model_without_a_linear_head(make_trainer, make_vit):
    with pytest.raises(ModelError, match="expected one linear classification head"):
        make_trainer(model=ViTModel(make_vit().config))


def test_an_unknown_feature_module(make_trainer):
    with pytest.raises(ModelError, match="expected module names"):
        make_trainer(feature_module="head")


@pytest.mark.parametrize(
    "options,message",
    [
        ({"strength": -1.0}, "strength of at least 0"),
        ({"horizon": 0.0}, "positive horizon"),
        ({"max_primary_drop": -1.0}, "at least 0 points"),
        ({"harmful_group_rows": 2}, "harmful_group_rows of at least 3"),
        ({"primary_loss_weight": 0.0}, "something that keeps the primary task"),
        ({"objective": "magic"}, "expected objectives among"),
        ({"term_shares": "nothing=1"}, "expected term_shares of terms"),
        ({"weight": "a=b"}, "expected weight like"),
        ({"max_primary_drop": 1.0}, "expected an eval_dataset for max_primary_drop"),
    ],
)
def test_options_that_cannot_be(make_trainer, options, message):
    with pytest.raises(ConfigError, match=message):
        make_trainer(**options)


def test_the_guard_and_the_best_model_of_the_trainer_exclude_each_other(make_trainer, make_pixels):
    with pytest.raises(ConfigError, match="got both"):
        make_trainer(
            evaluation=make_pixels(12),
            max_primary_drop=1.0,
            load_best_model_at_end=True,
            eval_strategy="steps",
            save_strategy="steps",
        )


def test_a_metric_the_evaluation_does_not_give(make_trainer, make_pixels):
    with pytest.raises(ConfigError, match="expected metric 'f1'"):
        make_trainer(evaluation=make_pixels(12), max_primary_drop=1.0, guard_metric="f1").train()


def test_divergence_is_an_error_not_a_log_line(make_trainer):
    trainer = make_trainer(learning_rate=1e30, max_steps=6, max_grad_norm=0.0, objective="condition_number")
    with pytest.raises(TrainingDivergedError, match="lower the learning rate"):
        trainer.train()


def test_an_objective_of_ones_own_trains_without_touching_the_trainer(make_trainer):
    name = "small_features"
    try:
        register_objective(name, Term("harmful_energy", "harmful", lambda rows, _: rows.features.square().mean()))
        with pytest.raises(ConfigError, match="new objective name"):
            register_objective(name, *terms_of(name))
        trainer = make_trainer(objective=name, weight="1", strength=10.0, max_steps=8, learning_rate=1e-2)
        trainer.train()
        energies = [entry["harmful_energy"] for entry in trainer.state.log_history if "harmful_energy" in entry]
        assert energies == sorted(energies, reverse=True) and energies[-1] < 0.95 * energies[0]
    finally:
        OBJECTIVES.pop(name, None)


def test_everything_promised_is_logged(make_trainer, make_pixels):
    trainer = make_trainer(objective="condition_number", evaluation=make_pixels(12), distillation=1.0)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert {
        "harmful_log_kappa",
        "primary_log_kappa",
        "harmful_r_ill",
        "primary_r_well",
        "lambda/harmful_r_ill",
        "lambda/primary_r_well",
        "harmful_effective_rank",
        "primary_effective_rank",
        "primary_loss",
        "distillation",
        "strength",
    } <= set(entry)


def test_balanced_weights_give_each_term_its_share_of_the_reference_gradient():
    terms = terms_of("condition_number")
    weights = TermWeights(terms, "auto", strength=0.5, shares="primary_r_well=0.1")
    weights.reference = torch.tensor(2.0).double()
    gradients = {"harmful_r_ill": torch.full((4, 4), 3.0).double(), "primary_r_well": torch.full((4, 4), 5.0).double()}
    found = {name: float((weights.update(gradients)[name] * gradients[name]).norm()) for name in gradients}
    assert found == pytest.approx({"harmful_r_ill": 1.0, "primary_r_well": 0.1})
    weights.factor = 2.0
    satisfied = {name: torch.zeros_like(value) for name, value in gradients.items()}
    kept = {name: float(value) for name, value in weights.norms.items()}
    assert all(torch.isfinite(value) for value in weights.update(satisfied).values())
    assert {name: float(value) for name, value in weights.norms.items()} == kept  # zeros are not averaged in
    other = TermWeights(terms, "auto", strength=0.5, shares="primary_r_well=0.1")
    other.load_state(weights.state())
    assert other.factor == 2.0
    again, original = other.update(gradients), weights.update(gradients)
    assert float(again["harmful_r_ill"]) == pytest.approx(float(original["harmful_r_ill"]))
