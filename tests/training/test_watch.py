"""What decides does not depend on what is logged: divergence, the guard's choice, and what reaches the disk."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.trainer_callback import TrainerCallback

from hf_immunize.errors import DecompositionError, ModelError, TrainingDivergedError
from hf_immunize.linalg import ridge_accuracies
from hf_immunize.training import ImmunizationConfig, ImmunizationTrainer
from hf_immunize.training.core.meter import Meter
from hf_immunize.training.core.registry import terms_of
from hf_immunize.training.core.watch import Watch

SILENT = {"logging_steps": 500, "logging_strategy": "steps"}


class Poison(TrainerCallback):
    """Puts a NaN into one weight at the end of a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                model.classifier.weight[0, 0] = float("nan")


def files_of(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file()) if folder.exists() else []


@pytest.mark.parametrize("logging", [{"logging_steps": 1}, SILENT, {"logging_nan_inf_filter": True}])
def test_divergence_is_found_however_rarely_is_logged(make_trainer, tmp_path, logging):
    options = {"learning_rate": 1e30, "max_steps": 6, "max_grad_norm": 0.0, "save_strategy": "steps", "save_steps": 6}
    trainer = make_trainer(**options, **logging)
    with pytest.raises(TrainingDivergedError, match="at step 2: lower the learning rate"):
        trainer.train()
    assert files_of(tmp_path / "run") == []


@pytest.mark.parametrize("step", [2, 4])  # 4: the last one, after which no loss is computed
def test_weights_that_are_no_numbers_are_not_returned_and_not_saved(make_trainer, tmp_path, step):
    trainer = make_trainer(callbacks=[Poison(step)], save_strategy="steps", save_steps=2, **SILENT)
    with pytest.raises(TrainingDivergedError, match="nothing was saved|Nothing was saved"):
        trainer.train()
    assert not [name for name in files_of(tmp_path / "run") if name.endswith(".safetensors")] or step == 4
    with pytest.raises(TrainingDivergedError, match="got NaN or infinity in .*classifier.weight"):
        trainer.save_model(str(tmp_path / "saved"))
    assert files_of(tmp_path / "saved") == []


def test_a_model_with_nan_or_in_half_precision_is_refused_before_training(make_trainer, make_vit):
    broken = make_vit()
    broken.vit.layernorm.bias.data[0] = float("inf")
    with pytest.raises(ModelError, match="expected finite weights in the model before immunization"):
        make_trainer(model=broken)
    with pytest.raises(ModelError, match="in float32, got float16"):
        make_trainer(model=make_vit().half())


def test_logging_decides_nothing(make_trainer, make_vit, make_pixels):
    """The same weights, history and choice at any interval of logging; and they are not those of before."""
    found = []
    for logging in ({"logging_steps": 1}, {"logging_steps": 3}, SILENT, {"logging_strategy": "no"}):
        model = make_vit()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        trainer = make_trainer(
            model=model, evaluation=make_pixels(12), max_primary_drop=100.0, max_steps=6, eval_steps=2, weight="auto",
            **logging,
        )
        trainer.train()
        found.append((trainer.guard_record, {k: v.clone() for k, v in model.state_dict().items()}))
        assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for record, weights in found[1:]:
        assert record == found[0][0] and record.returned_step > 0
        assert all(torch.equal(value, found[0][1][name]) for name, value in weights.items())


@pytest.mark.parametrize("length", [{"max_steps": 40}, {"num_train_epochs": 3}])
def test_the_guard_works_at_default_intervals(make_vit, make_pixels, tmp_path, length):
    """No eval_steps, no logging_steps: a short run is evaluated more than once, and its weights are returned."""
    model = make_vit()
    args = ImmunizationConfig(str(tmp_path / "run"), max_primary_drop=100.0, use_cpu=True, report_to="none",
                              disable_tqdm=True, save_strategy="no", **length)
    before = model.classifier.weight.detach().clone()
    trainer = ImmunizationTrainer(model, args, make_pixels(320), make_pixels(60, seed=1), make_pixels(12))
    trainer.train()
    record = trainer.guard_record
    assert len(record.history) >= 8 and record.returned_step > 0 and record.held
    assert float((model.classifier.weight - before).abs().max()) > 1e-4


def test_why_nothing_is_returned_is_said_as_it_was(make_trainer, make_vit, make_pixels, caplog):
    primary = make_pixels(24)
    model = make_vit()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(pixel_values=primary.pixel_values, labels=primary.labels).loss.backward()
        optimizer.step()
    trainer = make_trainer(
        model=model, primary=primary, evaluation=primary, strength=1e4, weight="auto", objective="ill_only",
        learning_rate=30.0, max_primary_drop=0.0, eval_steps=1, max_steps=3,
    )
    with caplog.at_level("WARNING", logger="hf_immunize.training.core.guarded"):
        trainer.train()
    assert trainer.guard_record.returned_step == 0
    assert "was held at none of 3 evaluations (smallest drop" in caplog.text


def test_a_watch_names_the_first_step_that_broke_and_forgets_nothing():
    (term,) = terms_of("closed_form_adversary")
    watch = Watch([term])
    for step, value in ((1, 0.5), (2, 0.3)):
        watch.step = step
        watch.add({term.name: torch.tensor(value), "primary_loss": torch.tensor(1.0)})
    other = Watch([term])
    other.load_state(watch.state())
    assert watch.progress() == other.progress() == pytest.approx(0.4)
    assert watch.progress() == math.inf  # nothing since
    watch.step = 3
    watch.add({"primary_loss": torch.tensor(2.0)})
    watch.step = 4
    watch.add({"primary_loss": torch.tensor(float("nan"))})
    watch.step = 5
    watch.add({"primary_loss": torch.tensor(float("inf")), term.name: torch.tensor(float("nan"))})
    with pytest.raises(TrainingDivergedError, match=r"got \['primary_loss'\] at step 4"):
        watch.settle()


def test_a_diagnostic_that_is_undefined_is_no_divergence():
    watch = Watch(())
    meter = Meter(watch)
    meter.add({"harmful_log_kappa": torch.tensor(float("nan"))}, diagnostic=True)
    meter.add({"primary_loss": torch.tensor(1.0)})
    watch.settle()
    assert math.isnan(meter.drain()["harmful_log_kappa"])


def test_harmful_features_that_collapse_are_the_goal_and_no_divergence(make_trainer, make_pixels):
    """Every harmful image the same: no variance, no condition number, no rank; the run goes on and logs the rest."""
    harmful = make_pixels(30, seed=1)
    harmful.pixel_values[:] = harmful.pixel_values[0]
    trainer = make_trainer(harmful=harmful, objective="closed_form_adversary", logging_steps=1)
    trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert len(logs) == 4 and all("harmful_log_kappa" not in row and "primary_log_kappa" in row for row in logs)


@pytest.mark.parametrize("objective", ["closed_form_adversary", "simulated_attack", "trap"])
def test_features_that_cannot_be_decomposed_are_a_step_that_diverged(make_trainer, objective):
    trainer = make_trainer(learning_rate=1e30, max_steps=6, max_grad_norm=0.0, objective=objective)
    with pytest.raises(TrainingDivergedError, match=r"expected finite losses and spectra.*at step \d"):
        trainer.train()


def test_values_that_broke_before_a_decomposition_did_are_named():
    watch = Watch([])
    watch.step = 3
    with pytest.raises(TrainingDivergedError, match="without a spectrum at step 3.*lower the learning rate"):
        with watch.over_steps():
            ridge_accuracies(torch.full((4, 2), math.nan), torch.tensor([0, 1, 0, 1]), torch.zeros(4, 2),
                             torch.tensor([0, 1, 0, 1]), [1.0])  # fmt: skip
    with pytest.raises(TrainingDivergedError, match=r"\['primary_loss'\] at step 3"):
        with watch.over_steps():
            watch.add({"primary_loss": torch.tensor(math.nan)})
            raise DecompositionError("no")
