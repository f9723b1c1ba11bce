"""Every default by its value, and what each that matters does in a run with nothing else set."""

from __future__ import annotations

import dataclasses
import math
import types

import pytest
import torch
from denoiser_builders import build_denoiser, build_examples, build_scheduler
from transformers import TrainingArguments

from hf_immunize import ImmunizationConfig, ImmunizationTrainer
from hf_immunize.models import load_classifier, load_processor
from hf_immunize.regularizers import closed_form_adversary
from hf_immunize.training.core.options import ImmunizationOptions
from hf_immunize.training.diffusion import DiffusionImmunizationConfig, DiffusionImmunizationTrainer
from hf_immunize.training.vision.rate import with_rate

BOTH = {
    "objective": "condition_number", "weight": "auto", "strength": 0.5, "term_shares": None, "site_layouts": None,
    "horizon": "30,300,3000", "harmful_group_rows": 32, "attacker_steps": 4, "attacker_rank": 0,
    "attacker_learning_rate": 1e-3, "attacker_optimizers": "adamw", "attacker_rate_decades": 0.0,
    "primary_loss_weight": 1.0, "distillation": 0.0, "max_primary_drop": None, "max_strength_factor": 8.0,
    "ema_decay": 0.0, "attacker_second_order": False, "probe_steps": 0,
}  # fmt: skip
OPEN = dict.fromkeys(("strength", "distillation", "feature_distillation"))  # until there is a model
CLASSIFIER = BOTH | OPEN | {
    "sites": "head", "trainable_modules": None, "per_device_harmful_batch_size": 128, "memorization": 0.5,
    "cache_frozen_features": False, "feature_cache_dir": None, "augmentation": None, "attacker_head": "refitted",
    "attacker_norms": "frozen", "attacker_resets": 0, "attacker_depths": None,
    "guard_metric": "accuracy", "learning_rate": 3e-4, "per_device_train_batch_size": 64, "dataloader_timeout": 600.0,
    "harmful_classes_per_batch": None, "feature_module": None, "site_weights": None, "feature_bank_rows": 0,
    "precondition_gradients": None, "precondition_ridge": 1e-3, "freeze_norm_statistics": True,
    "logging_nan_inf_filter": False, "attacker_lora_rank": 0, "attacker_lora_rate": None,
}  # fmt: skip
DENOISER = BOTH | {
    "sites": "attention,middle", "trainable_modules": "all", "per_device_harmful_batch_size": 32, "site_levels": "0,1",
    "attacker_renamed": 0.0, "attacker_conditions": "name", "attacker_ceiling": 3.0, "merge_lora": True, "lora_rank": 8,
    "min_snr_gamma": None, "logit_normal": False, "max_steps": 500, "per_device_train_batch_size": 32,
    "gradient_accumulation_steps": 1, "learning_rate": 1e-4, "optim": "adamw_torch", "optim_args": None,
    "optim_target_modules": None, "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0,
    "max_grad_norm": 1.0, "gradient_checkpointing": False, "mixed_precision": "no", "eval_batch_size": 32,
    "eval_steps": 50, "logging_steps": 10, "save_steps": 0, "save_total_limit": 1, "validation_steps": 0, "seed": 0,
    "report_to": "none", "disable_progress": False, "use_cpu": False, "trainable": None, "max_loss_factor": None,
}  # fmt: skip
STOCK = {"logging_steps": 500, "save_steps": 500, "per_device_eval_batch_size": 8, "num_train_epochs": 3.0,
         "gradient_accumulation_steps": 1, "lr_scheduler_type": "linear", "warmup_steps": 0, "weight_decay": 0.0,
         "max_grad_norm": 1.0, "seed": 42, "dataloader_num_workers": 0}  # fmt: skip
"""Defaults of transformers' own that the run below relies on."""


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def test_each_default_of_a_classifiers_run(tmp_path):
    found = ImmunizationConfig(str(tmp_path))
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert {field.name for field in dataclasses.fields(found)} - inherited <= set(CLASSIFIER)
    assert {name: getattr(found, name) for name in CLASSIFIER} == CLASSIFIER
    other = ImmunizationConfig(str(tmp_path), objective="rep_noise")
    assert {name: getattr(other, name) for name in OPEN} == dict(zip(OPEN, (0.5, 0.0, 0.0), strict=True))
    assert {name: getattr(found, name) for name in STOCK} == STOCK
    assert found.eval_strategy == "no" and found.eval_steps is None
    guarded = ImmunizationConfig(str(tmp_path), max_primary_drop=1.0)
    assert guarded.eval_strategy == "steps" and guarded.eval_steps == 0.1
    chosen = ImmunizationConfig(str(tmp_path), max_primary_drop=1.0, eval_steps=7)
    assert chosen.eval_strategy == "steps" and chosen.eval_steps == 7


def test_what_fits_a_probe_takes_more_rows_and_a_rate_of_the_model_unless_told_otherwise(tmp_path):
    found = ImmunizationConfig(str(tmp_path), objective="closed_form_adversary+ill_only")
    assert (found.per_device_harmful_batch_size, found.learning_rate) == (256, None)
    chosen = ImmunizationConfig(str(tmp_path), objective="closed_form_adversary", learning_rate=0.0,
                                per_device_harmful_batch_size=128)
    assert (chosen.per_device_harmful_batch_size, chosen.learning_rate) == (128, 0.0)


class Answering(torch.nn.Module):
    """Logits W·x of an image of 8 numbers; the second layer is frozen."""

    def __init__(self, size, outputs=64):
        super().__init__()
        draws = torch.Generator().manual_seed(1)
        self.weight = torch.nn.Parameter(size * torch.randn(outputs, 8, generator=draws))
        self.frozen = torch.nn.Parameter(torch.ones(outputs), requires_grad=False)

    def forward(self, pixel_values):
        return types.SimpleNamespace(logits=self.frozen * (pixel_values.flatten(1) @ self.weight.T))


@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-3, 4e-3, 1.0])
def test_the_rate_is_where_a_first_step_changes_the_answer_by_three_fifths(tmp_path, size):
    """Of z = W·x the gradient of log p_c is (1[k = c] − p_k)·x_j: a step of its signs is ±η·‖x‖₁ in each logit."""
    args = ImmunizationConfig(str(tmp_path), objective="closed_form_adversary")
    model, row = Answering(size), {"pixel_values": torch.linspace(-1, 1, 8).view(2, 2, 2)}
    held = {name: value.clone() for name, value in model.state_dict().items()}
    given = with_rate(args, model, [row])
    x = row["pixel_values"].flatten()
    z = model.weight.detach() @ x
    wanted = 0.6 * float((z - z.mean()).norm() / (64**0.5 * x.abs().sum()))
    assert given.learning_rate == pytest.approx(min(max(wanted, 5e-5), 3e-3), rel=0.06)
    assert args.learning_rate is None and given is not args
    assert model.training and all(torch.equal(value, held[name]) for name, value in model.state_dict().items())
    args.learning_rate = 0.5
    assert with_rate(args, model, [row]) is args


def test_without_two_logits_the_rate_is_the_plain_one(tmp_path):
    args = ImmunizationConfig(str(tmp_path), objective="closed_form_adversary")
    row = {"pixel_values": torch.ones(2, 2, 2)}
    assert with_rate(args, Answering(1.0, outputs=1), [row]).learning_rate == 3e-4
    unnamed = Answering(1.0)
    unnamed.forward = lambda pixel_values: types.SimpleNamespace(reconstruction=pixel_values)
    assert with_rate(args, unnamed, [row]).learning_rate == 3e-4


def test_each_default_of_a_pipelines_run(tmp_path):
    found = dataclasses.asdict(DiffusionImmunizationConfig(str(tmp_path)))
    assert found.pop("output_dir") == str(tmp_path) and found == DENOISER
    assert {field.name for field in dataclasses.fields(ImmunizationOptions)} <= found.keys()


@pytest.fixture
def digits(digits_primary, digits_base):
    primary, harmful, _ = digits_primary
    processor = load_processor(digits_base)
    return {
        "model": load_classifier(digits_base), "train_dataset": primary.pixels("train", processor),
        "eval_dataset": primary.pixels("validation", processor),
        "harmful_dataset": harmful.pixels("defense", processor),
    }


def test_with_a_number_of_steps_alone_a_guarded_run_immunizes(digits, tmp_path):
    """At logging_steps=500 no step is logged; guard, choice and outcome do without."""
    args = ImmunizationConfig(str(tmp_path), objective="closed_form_adversary", max_primary_drop=1.0, max_steps=40)
    trainer = ImmunizationTrainer(args=args, **digits)
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    assert next(iter(trainer.get_train_dataloader()))["labels"].shape == (64,)
    assert trainer._streams["harmful"].batch(0)["labels"].shape == (256,)
    trainer.train()
    assert set(trainer.lr_scheduler.base_lrs) == {trainer.args.learning_rate} and args.learning_rate is None
    assert 1e-4 < trainer.args.learning_rate < 1e-3, trainer.args.learning_rate
    assert not any("loss" in entry for entry in trainer.state.log_history)
    history, outcome = trainer.guard_record.history, trainer.outcome
    assert [entry["step"] for entry in history] == [4 * turn for turn in range(1, 11)]
    assert trainer.guard_record.held and trainer.guard_record.drop <= 1.0 and trainer.saved_step > 0
    moved = max(float((value - start[name]).abs().max()) for name, value in trainer.model.state_dict().items())
    assert moved > 1e-3
    assert outcome.probe_after < outcome.probe_before - 0.1
    assert outcome.terms_after["harmful_adversary_r2"] < 0.5 * outcome.terms_before["harmful_adversary_r2"]


def test_three_epochs_are_guarded_ten_times_as_well(digits, tmp_path):
    """num_train_epochs of TrainingArguments, which a run with nothing set at all has."""
    trainer = ImmunizationTrainer(args=ImmunizationConfig(str(tmp_path), max_primary_drop=1.0), **digits)
    trainer.train()
    steps = 3 * math.ceil(len(digits["train_dataset"]) / 64)
    assert trainer.state.global_step == trainer.state.max_steps == steps and trainer.args.num_train_epochs == 3
    assert 8 <= len(trainer.guard_record.history) <= 11 and trainer.guard_record.history[-1]["step"] == steps
    before, after = (sum(found.values()) for found in (trainer.outcome.terms_before, trainer.outcome.terms_after))
    assert trainer.guard_record.held and after < before


def test_the_default_rate_and_strength_move_the_term_further_than_what_they_replace(digits, digits_base, tmp_path):
    """TrainingArguments' 5e-5, and no strength."""
    left = {}
    for name, options in {"default": {}, "rate": {"learning_rate": 5e-5}, "strength": {"strength": 0.0}}.items():
        args = ImmunizationConfig(str(tmp_path / name), objective="closed_form_adversary", max_steps=20, **options)
        trainer = ImmunizationTrainer(args=args, **(digits | {"model": load_classifier(digits_base)}))
        trainer.train()
        left[name] = trainer.outcome.terms_after["harmful_adversary_r2"]
    assert left["default"] < left["rate"] / 2 and left["default"] < left["strength"] - 0.02, left


@pytest.mark.parametrize("objective", ["condition_number", "simulated_attack", "imma"])
def test_a_denoiser_trains_guarded_with_a_number_of_steps_alone(tmp_path, objective):
    """Shorter than eval_steps=50: the last step is evaluated; rows are fewer than a batch."""
    model = build_denoiser("unet")
    start = {name: value.clone() for name, value in model.state_dict().items()}
    args = DiffusionImmunizationConfig(str(tmp_path), objective=objective, max_primary_drop=5.0, max_steps=12)
    trainer = DiffusionImmunizationTrainer(
        model, build_scheduler("unet"), args, train_dataset=build_examples("unet", 40),
        harmful_dataset=build_examples("unet", 40, seed=1, label=9), eval_dataset=build_examples("unet", 12, seed=5),
    )
    trainer.train()
    assert any(not torch.equal(value, start[name]) for name, value in trainer.bare.state_dict().items())
    assert trainer.guard_record.held and trainer.guard_record.history[-1]["step"] == 12
    assert [entry["step"] for entry in trainer.log_history] == [10, 12]  # logging_steps, and the last


def test_few_rows_of_many_classes_pull_at_the_default_weight_of_known_rows(tmp_path):
    """R² of noise on other rows is below 0, where relu has no gradient: as with few photos of many cars."""
    rows = torch.randn(24, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = (0.0, ImmunizationConfig(str(tmp_path)).memorization)
    slopes = []
    for weight in weights:
        leaf = rows.clone().requires_grad_()
        closed_form_adversary(leaf, torch.arange(24) % 12, horizon=300.0, memorization=weight).backward()
        slopes.append(float(leaf.grad.norm()))
    assert slopes[0] == 0 < slopes[1], slopes
