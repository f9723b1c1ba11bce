"""Spectra of more rows than a batch holds: exact when nothing moves, stale by a known amount when it does."""

from __future__ import annotations

import pytest
import torch
from transformers.trainer_callback import TrainerCallback

from hf_immunize.data import batches
from hf_immunize.features import extract_features
from hf_immunize.linalg import second_moment_spectrum
from hf_immunize.regularizers import well_conditioned
from hf_immunize.training.core.bank import FeatureBank
from hf_immunize.training.core.terms import Rows
from hf_immunize.training.vision.checkpoints import last_complete_checkpoint


def rows(value: float, count: int = 4) -> Rows:
    return Rows(torch.full((count, 2), value), torch.full((count,), int(value)))


def test_whole_steps_are_dropped_oldest_first():
    bank = FeatureBank(10)
    assert bank.past("harmful", "head") is None
    for step in range(4):
        bank.add("harmful", "head", rows(float(step)))
    assert bank.past("harmful", "head").labels.tolist() == [2] * 4 + [3] * 4
    bank.add("harmful", "head", rows(9.0, 11))
    assert bank.past("harmful", "head") is None
    assert bank.past("primary", "head") is None and bank.past("harmful", "other") is None


def test_state_survives_a_round_trip_in_order():
    bank, other = FeatureBank(100), FeatureBank(100)
    for step in range(12):
        bank.add("harmful", "a.b", rows(float(step)))
    other.load_state(bank.state())
    assert torch.equal(other.past("harmful", "a.b").features, bank.past("harmful", "a.b").features)


class WholeSet(TrainerCallback):
    """Spectrum of the whole primary set with the weights of each step."""

    def __init__(self, data):
        self.data, self.truth = data, []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        features = extract_features(model, batches(self.data), ["classifier"])["classifier"]
        spectrum = second_moment_spectrum(features)
        self.truth.append({"log_kappa": spectrum.log_condition, "r_well": well_conditioned(spectrum)})


def error(make_trainer, make_vit, make_pixels, what, **options) -> float:
    """|measured − true| at the fourth step, the last of the first epoch, when all primary rows have been seen."""
    primary = make_pixels(24, dtype=torch.float64)
    watch = WholeSet(primary)
    trainer = make_trainer(
        model=make_vit(dtype=torch.float64), primary=primary, harmful=make_pixels(30, seed=1, dtype=torch.float64),
        callbacks=[watch], per_device_train_batch_size=6, max_steps=4, objective="condition_number+opt_kappa",
        **options,
    )  # fmt: skip
    trainer.train()
    seen = [entry[f"primary_{what}"] for entry in trainer.state.log_history if "loss" in entry]
    return abs(seen[3] - float(watch.truth[3][what]))


@pytest.mark.slow
def test_with_weights_at_rest_the_bank_gives_the_value_of_the_whole_dataset(make_trainer, make_vit, make_pixels):
    """24 rows of 16 features, 6 at a time: the fourth step of an epoch has all of them before it."""
    for what in ("log_kappa", "r_well"):
        exact = error(make_trainer, make_vit, make_pixels, what, learning_rate=0.0, feature_bank_rows=18)
        without = error(make_trainer, make_vit, make_pixels, what, learning_rate=0.0)
        assert exact < 1e-7 and exact < 1e-4 * without


@pytest.mark.slow
def test_the_bias_of_stale_rows_vanishes_with_the_learning_rate(make_trainer, make_vit, make_pixels):
    biases = [
        error(make_trainer, make_vit, make_pixels, "r_well", learning_rate=rate, feature_bank_rows=18,
              optim="sgd", lr_scheduler_type="constant")
        for rate in (1e-2, 1e-3, 1e-4)
    ]  # fmt: skip
    assert biases[0] > 5 * biases[1] > 25 * biases[2] > 0


@pytest.mark.parametrize("objective", ["condition_number", "imma"])
def test_bank_and_attacker_resume_bit_for_bit(make_trainer, make_vit, make_pixels, tmp_path, objective):
    def run(steps: int, folder: str, resume=None):
        trainer = make_trainer(
            model=make_vit(dropout=0.2), max_steps=steps, save_strategy="steps", save_steps=3, objective=objective,
            feature_bank_rows=20, ema_decay=0.9, lr_scheduler_type="constant", output_dir=str(tmp_path / folder),
            augmentation="flip,erase",
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return {name: value.clone() for name, value in trainer.model.state_dict().items()}

    truth = run(6, "whole")
    run(3, "part")
    resumed = run(6, "part", last_complete_checkpoint(tmp_path / "part"))
    assert all(torch.equal(resumed[name], value) for name, value in truth.items())
