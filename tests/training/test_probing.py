"""A probe on held-out harmful rows while training: it arrives in trackers, and changes nothing."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import pytest
import torch

from hf_immunize.errors import ConfigError, DataError
from hf_immunize.training import ImmunizationConfig, ImmunizationTrainer
from hf_immunize.training.diffusion import DiffusionImmunizationConfig


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Every scalar of the event files below a folder, by tag and step: records of length, checksum, data, checksum."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2", reason="tensorboardX is not installed")
    found: dict[str, dict[int, float]] = {}
    for path in folder.rglob("events.out.tfevents.*"):
        data, place = path.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            event = event_pb2.Event.FromString(data[place + 12 : place + 12 + length])
            place += 12 + length + 4
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def test_what_is_measured_arrives_in_an_event_file(tmp_path, make_vit, make_pixels, monkeypatch):
    """transformers' own report_to: spectra, terms, guard and probe, at the steps they belong to."""
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed: pip install tensorboardX")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    args = ImmunizationConfig(
        str(tmp_path / "run"), objective="closed_form_adversary", max_steps=6, per_device_train_batch_size=8,
        per_device_harmful_batch_size=24, learning_rate=1e-2, report_to="tensorboard", save_strategy="no",
        strength=30.0, logging_steps=2, probe_steps=3, max_primary_drop=100.0, eval_steps=3, disable_tqdm=True,
        use_cpu=True, seed=7, horizon="30",
    )  # fmt: skip
    trainer = ImmunizationTrainer(
        model=make_vit(), args=args, train_dataset=make_pixels(24), harmful_dataset=make_pixels(48, seed=1),
        harmful_eval_dataset=make_pixels(48, seed=2), eval_dataset=make_pixels(24, seed=3),
    )
    trainer.train()
    assert len(list((tmp_path / "events").rglob("events*"))) == 1, "what is logged in the end goes there too"
    drawn = scalars(tmp_path / "events")
    assert set(drawn["train/harmful_probe"]) == {0, 3, 6} and set(drawn["train/harmful_adversary_r2"]) == {2, 4, 6}
    assert drawn["train/harmful_probe"][0] == pytest.approx(trainer.outcome.probe_before, abs=1e-6)
    assert drawn["train/harmful_probe"][6] == pytest.approx(trainer.outcome.probe_after, abs=1e-6)
    assert {"train/harmful_log_kappa", "train/primary_log_kappa", "train/lambda/harmful_adversary_r2", "train/strength",
            "train/primary_drop"} <= set(drawn), "spectra, weights and the guard"
    assert all(math.isfinite(value) for steps in drawn.values() for value in steps.values())


def test_looking_changes_no_weight(make_trainer, make_vit, make_pixels):
    weights = []
    for steps in (0, 1):
        trainer = make_trainer(model=make_vit(dropout=0.1), objective="ill_only", probe_steps=steps)
        trainer.train()
        weights.append(trainer.model.state_dict())
        assert len([entry for entry in trainer.state.log_history if "harmful_probe" in entry]) == (6 if steps else 1)
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_rows_that_no_probe_can_tell_apart_are_refused(make_trainer, make_pixels):
    with pytest.raises(DataError, match="labels of two classes or more for probe_steps"):
        make_trainer(objective="ill_only", harmful=make_pixels(30, classes=1), probe_steps=1).train()
    with pytest.raises(ConfigError, match="expected no probe_steps for a pipeline, got 5: a probe reads features of a"):
        DiffusionImmunizationConfig("out", probe_steps=5)
    with pytest.raises(ConfigError, match="expected probe_steps of at least 0"):
        ImmunizationConfig("out", probe_steps=-1, report_to="none")
