"""Rows that cannot be read and workers that die or hang: the error names dataset and row, on both sides."""

from __future__ import annotations

import os
import time

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from hf_immunize.data import NamedStream
from hf_immunize.errors import ConfigError, DataError, ModelError, WorkerError
from hf_immunize.training import ImmunizationConfig, ImmunizationTrainer


class Fails(Dataset):
    """Good rows, but for one."""

    def __init__(self, rows, how: str, place: int = 5):
        self._rows, self._how, self._place = rows, how, place
        self.labels = rows.labels

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> dict:
        if row == self._place:
            if self._how == "raises":
                raise OSError("cannot identify image file 'cat.jpg'")
            if self._how in ("NaN", "NaN array", "infinity"):
                pixels = self._rows[row]["pixel_values"].clone()
                pixels[0, 0, 0] = float("inf" if self._how == "infinity" else "nan")
                return self._rows[row] | {"pixel_values": pixels.numpy() if "array" in self._how else pixels}
            if torch.utils.data.get_worker_info() is not None:
                time.sleep(8) if self._how == "hangs" else os._exit(1)
        return self._rows[row]


def start(make_trainer, make_pixels, side: str, how: str, **options) -> None:
    rows = {name: make_pixels(24, seed=seed) for seed, name in enumerate(("primary", "harmful", "evaluation"))}
    rows[side] = Fails(rows[side], how)
    options |= {"eval_strategy": "steps", "eval_steps": 1} if side == "evaluation" else {}
    make_trainer(**rows, max_steps=8, dataloader_pin_memory=False, **options).train()


NAMES = {"primary": "train_dataset", "harmful": "harmful_dataset", "evaluation": "eval_dataset"}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("side", NAMES)
def test_a_row_that_raises_is_named(make_trainer, make_pixels, side, workers):
    with pytest.raises(DataError, match=rf"row 5 of {NAMES[side]}, got OSError: cannot identify image file 'cat.jpg'"):
        start(make_trainer, make_pixels, side, "raises", dataloader_num_workers=workers)


@pytest.mark.parametrize("how", ["NaN", "NaN array", "infinity"])
@pytest.mark.parametrize("side", NAMES)
def test_a_row_with_pixels_that_are_no_numbers_is_named(make_trainer, make_pixels, side, how):
    with pytest.raises(DataError, match=rf"finite pixels in {NAMES[side]}, got NaN or infinity in row 5: remove"):
        start(make_trainer, make_pixels, side, how)


def test_such_a_row_of_the_held_out_ones_or_of_a_stream_is_named(make_trainer, make_vit, make_pixels, tmp_path):
    rows = {"train_dataset": make_pixels(24), "harmful_dataset": make_pixels(30, seed=1)}
    args = ImmunizationConfig(str(tmp_path), max_steps=1, use_cpu=True, report_to="none", save_strategy="no")
    held = Fails(make_pixels(24, seed=2), "NaN")
    with pytest.raises(DataError, match="finite pixels in harmful_eval_dataset, got NaN or infinity in row 5"):
        ImmunizationTrainer(make_vit(), args, **rows, harmful_eval_dataset=held).train()
    with pytest.raises(DataError, match="finite pixels in train_dataset, got NaN or infinity in row 5"):
        list(NamedStream(Endless(held), "train_dataset"))


class Endless(IterableDataset):
    """Rows in order, without numbers."""

    def __init__(self, rows):
        self._rows = rows

    def __iter__(self):
        yield from (self._rows[row] for row in range(len(self._rows)))


@pytest.mark.parametrize(
    "side", [pytest.param(side, marks=[] if side == "primary" else [pytest.mark.slow]) for side in NAMES]
)
def test_a_worker_that_hangs_is_an_error_after_the_time_limit(make_trainer, make_pixels, side):
    with pytest.raises(WorkerError, match=rf"a batch of {NAMES[side]} within dataloader_timeout=4 s"):
        start(make_trainer, make_pixels, side, "hangs", dataloader_num_workers=1, dataloader_timeout=4.0)


@pytest.mark.parametrize("side", NAMES)
def test_a_worker_that_dies_is_an_error_that_says_when(make_trainer, make_pixels, side):
    with pytest.raises(WorkerError, match=r"got one that died while (train|harmful|eval)_dataset was read"):
        start(make_trainer, make_pixels, side, "dies", dataloader_num_workers=1, dataloader_timeout=20.0)


def test_a_row_that_cannot_be_read_for_its_label_is_named_before_training(make_trainer, make_pixels):
    class Unlabelled(Fails):
        labels = property(lambda self: None, lambda self, _: None)

    with pytest.raises(DataError, match="row 5 of harmful_dataset, got OSError"):
        make_trainer(harmful=Unlabelled(make_pixels(24), "raises"))


def test_a_harmful_class_without_rows_is_named_before_training(make_trainer, make_pixels):
    rows = make_pixels(24)
    rows.labels[rows.labels == 1] = 0
    with pytest.raises(DataError, match=r"every class in harmful_dataset, got none of class 1 \(class 1\): add such"):
        make_trainer(harmful=rows)
    plain = [{"pixel_values": torch.zeros(3, 8, 8), "labels": label} for label in (0, 2, 0, 2)]
    with pytest.raises(DataError, match=r"got none of class 1 \(1\): .* without gaps"):
        make_trainer(harmful=plain)


def test_a_head_of_another_number_of_classes_is_refused_before_training(make_trainer, make_vit, make_pixels):
    with pytest.raises(ModelError, match="a head with 3 outputs, one for each class of train_dataset, got 5"):
        make_trainer(model=make_vit(labels=5))
    with pytest.raises(DataError, match=r"labels in 0\.\.2 in eval_dataset, got 3 in row 3"):
        make_trainer(evaluation=make_pixels(24, classes=4))


def test_a_time_limit_below_nothing_is_refused(make_trainer):
    with pytest.raises(ConfigError, match="dataloader_timeout of at least 0"):
        make_trainer(dataloader_timeout=-1.0)
