"""Images are looked at before training: their precision, channels and size, on both sides and held out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import SIZE, tiny_classifier

from hf_immunize.data import PixelDataset
from hf_immunize.errors import DataError, ModelError
from hf_immunize.training import ImmunizationConfig, ImmunizationTrainer


class Rows(list):
    """A plain map-style dataset."""


def rows_of(pixels: PixelDataset, change) -> Rows:
    return Rows({"pixel_values": change(row["pixel_values"]), "labels": int(row["labels"])} for row in pixels)


@pytest.fixture
def run(make_pixels, tmp_path):
    def started(change=lambda pixels: pixels, model=None, held=None, size=SIZE, **options):
        settings = {"max_steps": 2, "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
                    "per_device_train_batch_size": 8, "per_device_harmful_batch_size": 12, "max_primary_drop": 100.0}
        names = {"train_dataset": 24, "harmful_dataset": 30, "eval_dataset": 12, "harmful_eval_dataset": 18}
        data = {name: rows_of(make_pixels(count, seed=seed, size=size), change)
                for seed, (name, count) in enumerate(names.items())}
        data |= {} if held is None else {"harmful_eval_dataset": held}
        trainer = ImmunizationTrainer(
            model or tiny_classifier("resnet"), ImmunizationConfig(str(tmp_path / "run"), **settings | options), **data
        )
        trainer.train()
        return trainer

    return started


@pytest.mark.parametrize("options", [{}, {"cache_frozen_features": True, "trainable_modules": "last:1"}])
def test_pixels_of_another_precision_are_converted_to_that_of_the_weights(run, options):
    """NumPy's own default is float64; a convolution of float32 weights takes nothing else."""
    whole = lambda pixels: pixels.round()  # noqa: E731, equal in every precision
    changes = (whole, lambda pixels: np.asarray(whole(pixels), dtype=np.float64), lambda pixels: whole(pixels).half())
    first, *others = (run(change, **options) for change in changes)
    for other in others:
        ends = other.model.state_dict()
        assert all(torch.equal(value, ends[name]) for name, value in first.model.state_dict().items())
        assert other.outcome == first.outcome and other.guard_record == first.guard_record


def test_weights_of_float64_stay_what_they_are(run):
    assert run(model=tiny_classifier("resnet").double()).model.dtype == torch.float64


@pytest.mark.parametrize("change,told", [
    (lambda pixels: pixels.permute(1, 2, 0), r"3 channel\(s\), C x H x W, in train_dataset, got shape \(16, 16, 3\) in "
     r"row 0: .*Move the channels to the front"),
    (lambda pixels: pixels[:1], r"3 channel\(s\), C x H x W, in train_dataset, got shape \(1, 16, 16\) in row 0"),
], ids=["channels last", "grey"])  # fmt: skip
def test_images_of_other_channels_are_named(run, change, told):
    with pytest.raises(DataError, match=told):
        run(change)


def test_what_the_models_own_forward_refuses_is_named(run, make_vit):
    with pytest.raises(DataError, match=r"in train_dataset, got \(3, 16, 16\) in row 0, on which its forward raised"):
        run(model=make_vit())  # of 8 x 8 pixels


def test_held_out_harmful_images_of_another_size_are_refused(run, make_pixels):
    with pytest.raises(DataError, match=r"size \(3, 16, 16\) in harmful_eval_dataset, got \(3, 8, 8\): preprocess"):
        run(held=make_pixels(18, size=8))


@pytest.mark.parametrize("model", [None, "google/vit-base-patch16-224"])
def test_what_is_no_model_is_refused(make_pixels, tmp_path, model):
    with pytest.raises(ModelError, match="expected a model, got .*load it first"):
        ImmunizationTrainer(model, ImmunizationConfig(str(tmp_path), use_cpu=True), make_pixels(24), make_pixels(30))
