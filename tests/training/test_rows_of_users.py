"""Datasets of users' own given to the trainer: transforms, formats, streams, tuples, exceptions of their code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from torch.utils.data import Dataset as TorchDataset
from transformers import ViTConfig, ViTForImageClassification

from hf_immunize.errors import DataError


def table(rows: int = 24) -> Dataset:
    rng = np.random.default_rng(0)
    images = [PILImage.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(rows)]
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b", "c"])})
    return Dataset.from_dict({"image": images, "label": [row % 3 for row in range(rows)]}, features)


def transform(batch: dict) -> dict:
    batch["pixel_values"] = [torch.tensor(np.asarray(image)).permute(2, 0, 1) / 255 for image in batch["image"]]
    return batch  # the image stays in the row, as in many examples


def losses(trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_transform_needs_no_option_and_trains_as_the_same_rows_without_one(make_trainer, workers):
    """The image column was dropped before the transform could read it: KeyError 'image', reported as a bad row."""
    plain = table()
    stored = [{"pixel_values": row["pixel_values"], "labels": row["label"]} for row in plain.with_transform(transform)]
    made = plain.with_transform(transform)
    words = {"dataloader_num_workers": workers, "eval_strategy": "steps", "eval_steps": 2}
    by_rows = losses(make_trainer(primary=stored, harmful=stored, evaluation=stored, **words))
    by_transform = losses(make_trainer(primary=made, harmful=made, evaluation=made, **words))
    assert by_transform == by_rows and len(by_rows) == 4


@pytest.mark.slow
def test_a_transform_beside_other_heads(make_trainer):
    config = ViTConfig(image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                       intermediate_size=32, num_labels=1, problem_type="regression")
    model = ViTForImageClassification(config)
    made = table().with_transform(transform)
    assert len(losses(make_trainer(model=model, primary=made, harmful=made, max_steps=2))) == 2


def test_streams_tuples_and_mistakes_are_found_when_the_trainer_is_made(make_trainer):
    with pytest.raises(DataError, match="numbers in harmful_dataset, got list_iterator: .*streaming=True"):
        make_trainer(harmful=iter([{}]))
    with pytest.raises(DataError, match=r"one dataset as train_dataset, got a dict of \['one'\]: choose a split"):
        make_trainer(primary={"one": table()})
    with pytest.raises(DataError, match=r"numbers in eval_dataset\['one'\], got list_iterator"):
        make_trainer(evaluation={"one": iter([{}])})
    tuples = [(torch.zeros(3, 8, 8), row % 3) for row in range(12)]
    for side, name in (("primary", "train_dataset"), ("harmful", "harmful_dataset")):
        with pytest.raises(DataError, match=rf"rows that are dicts in {name}, got a tuple of Tensor, int in row 0"):
            make_trainer(**{side: tuples})
    with pytest.raises(DataError, match="a 'pixel_values' column in harmful_dataset, .*with dataset.with_transform"):
        make_trainer(harmful=table())
    wrong = table().with_transform(lambda batch: {"pixel_values": batch["picture"]})
    with pytest.raises(DataError, match="^KeyError: 'picture'. The code of train_dataset raised this"):
        make_trainer(primary=wrong)


class Late(TorchDataset):
    """Raises in training alone: constructing the trainer reads labels elsewhere."""

    def __init__(self, rows, error: BaseException):
        self.rows, self.labels, self.error = rows, rows.labels, error

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict:
        if row == 5:
            raise self.error
        return self.rows[row]


@pytest.mark.parametrize("side,name", [("primary", "train_dataset"), ("harmful", "harmful_dataset")])
def test_a_mistake_that_shows_in_training_keeps_its_class_and_traceback(make_trainer, make_pixels, side, name):
    mistake = AttributeError("'NoneType' object has no attribute 'convert'")
    with pytest.raises(DataError, match=rf"^AttributeError: 'None.* The code of {name} .* row 5 \(.*__getitem__\)"):
        make_trainer(**{side: Late(make_pixels(24), mistake)}, max_steps=8).train()
    for error in (KeyboardInterrupt(), MemoryError("no room")):
        with pytest.raises(type(error)) as caught:
            make_trainer(**{side: Late(make_pixels(24), error)}, max_steps=8).train()
        assert caught.value is error
