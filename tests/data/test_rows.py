"""Rows of users' own datasets: what cannot be read is named by row, what the user's code did wrong as that."""

from __future__ import annotations

import logging
import traceback

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset as TorchStream
from transformers import BatchFeature

from hf_immunize.data import NamedRows, check_sample, collate_pixels, fetch, labels_of, preprocess
from hf_immunize.errors import DataError, ModelError

ROW = {"pixel_values": torch.zeros(3, 4, 4), "labels": 1}


class Raises(TorchDataset):
    """Ten good rows, but row 3 raises."""

    def __init__(self, error: BaseException):
        self.error = error

    def __len__(self) -> int:
        return 10

    def __getitem__(self, row: int) -> dict:
        if row == 3:
            raise self.error
        return ROW


MISTAKES = [KeyError("image"), TypeError("no len"), AttributeError("no such"), IndexError("out of range"),
            NameError("x"), AssertionError("odd"), ImportError("no module"), NotImplementedError("later")]


@pytest.mark.parametrize("error", MISTAKES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("read", [lambda rows: NamedRows(rows, "train_dataset")[3],
                                  lambda rows: NamedRows(rows, "train_dataset").__getitems__([1, 3]),
                                  lambda rows: fetch(rows, 3, "train_dataset"),
                                  lambda rows: labels_of(rows, "train_dataset")])
def test_a_mistake_in_the_users_code_is_reported_as_that(error, read):
    """It was 'Remove the row or repair it' before, whatever the exception."""
    with pytest.raises(DataError) as caught:
        read(Raises(error))
    told = str(caught.value)
    assert told.startswith(f"{type(error).__name__}: {error}. The code of train_dataset raised this when it was asked")
    assert "asked for row 3" in told and __file__ in told and "in __getitem__" in told and "Remove the row" not in told
    assert caught.value.__cause__ is error
    assert traceback.extract_tb(error.__traceback__)[-1].name == "__getitem__"


@pytest.mark.parametrize("error", [
    OSError("cannot identify image file"), FileNotFoundError(2, "No such file", "a.png"), EOFError("cut"),
    PILImage.DecompressionBombError("too large"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
], ids=lambda error: type(error).__name__)
def test_a_row_that_cannot_be_read_is_named(error):
    with pytest.raises(DataError, match=rf"expected row 3 of x, got {type(error).__name__}: .* Remove the row"):
        NamedRows(Raises(error), "x")[3]


def test_other_exceptions_may_be_either():
    with pytest.raises(DataError, match="^ValueError: odd label. The code of x raised this .*: repair the row, or"):
        NamedRows(Raises(ValueError("odd label")), "x")[3]


def test_an_error_inside_pillow_is_a_broken_image():
    class Broken(Raises):
        def __getitem__(self, row):
            return PILImage.frombytes("RGB", (30, 30), b"cut short")

    with pytest.raises(DataError, match="expected row 0 of x, got ValueError: not enough image data. Remove the row"):
        NamedRows(Broken(OSError()), "x")[0]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(2), MemoryError("no room"),
                                   torch.OutOfMemoryError("device"), ModelError("of ours"), DataError("of ours")],
                         ids=lambda error: type(error).__name__)
def test_what_is_no_fault_of_a_row_is_never_wrapped(error):
    for read in (lambda rows: rows[3], lambda rows: rows.__getitems__([3])):
        with pytest.raises(type(error)) as caught:
            read(NamedRows(Raises(error), "x"))
        assert caught.value is error


def test_workers_show_the_users_own_exception_and_traceback():
    loader = DataLoader(NamedRows(Raises(KeyError("image")), "train_dataset"), num_workers=1, collate_fn=list)
    with pytest.raises(DataError) as caught:
        list(loader)
    told = str(caught.value)
    assert "KeyError: 'image'. The code of train_dataset" in told and "raise self.error" in told


def test_rows_that_fail_together_but_not_one_by_one_are_told(caplog):
    class Batches(Raises):
        def __getitems__(self, rows):
            raise RuntimeError("only one at a time")

    with caplog.at_level(logging.WARNING):
        assert NamedRows(Batches(OSError()), "x of batches").__getitems__([1, 2]) == [ROW, ROW]
    assert "x of batches fails when several rows are asked for together" in caplog.text
    assert "RuntimeError: only one at a time" in caplog.text


def table(rows: int = 4) -> Dataset:
    images = [PILImage.fromarray(np.full((4, 4, 3), 10 * row, np.uint8)) for row in range(rows)]
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    return Dataset.from_dict({"image": images, "label": [row % 2 for row in range(rows)]}, features)


def transform(batch: dict) -> dict:
    pixels = [torch.tensor(np.asarray(image)).permute(2, 0, 1) / 255 for image in batch["image"]]
    return {"pixel_values": pixels, "labels": [1 - label for label in batch["label"]]}


class Stream(TorchStream):
    def __iter__(self):
        yield ROW


@pytest.mark.parametrize("make", [lambda: table().to_iterable_dataset(), Stream, lambda: iter([ROW]),
                                  lambda: DataLoader([ROW])], ids=["datasets", "torch", "iterator", "loader"])
def test_streams_say_what_is_needed(make):
    for read in (labels_of, NamedRows, lambda rows, name: preprocess(rows, None, label_names=["a"], name=name)):
        with pytest.raises(DataError, match=r"rows with numbers in x, got .*without streaming=True, .*from_list"):
            read(make(), "x")


def test_a_dict_of_splits_says_to_choose_one():
    with pytest.raises(DataError, match=r"one dataset as x, got a dict of \['test', 'train'\]: choose a split"):
        labels_of(DatasetDict({"train": table(), "test": table()}), "x")


@pytest.mark.parametrize("row", [(torch.zeros(3, 4, 4), 1), [torch.zeros(3, 4, 4), 1]], ids=["tuple", "list"])
def test_rows_without_names_say_to_return_a_dict(row):
    for read in (labels_of, check_sample):
        with pytest.raises(DataError, match=rf"dicts in x, got a {type(row).__name__} of Tensor, int in row 0: return"):
            read([row], "x")
    with pytest.raises(DataError, match=rf"rows that are dicts, got a {type(row).__name__}: return .'pixel_values'"):
        collate_pixels([row])
    with pytest.raises(DataError, match="rows that are dicts in x, got a Tensor in row 0"):
        labels_of([torch.zeros(3)], "x")


def test_any_mapping_is_a_row():
    rows = [BatchFeature({"pixel_values": torch.full((3, 4, 4), float(row)), "label": row}) for row in range(3)]
    assert labels_of(rows, "x") == [0, 1, 2] and check_sample(rows, "x") == (3, 4, 4)
    assert collate_pixels(rows)["pixel_values"][:, 0, 0, 0].tolist() == [0.0, 1.0, 2.0]


def test_labels_are_those_that_a_transform_makes():
    """Before: KeyError 'label', or the column as it was before the transform."""
    assert labels_of(table().with_transform(transform), "x") == [1, 0, 1, 0]
    kept = table().with_transform(lambda batch: transform(batch) | {"labels": batch["label"]})
    assert labels_of(kept, "x") == labels_of(table(), "x") == [0, 1, 0, 1]
    for form in ("torch", "numpy"):
        assert labels_of(table().with_format(form), "x") == [0, 1, 0, 1]
    wrong = table().with_transform(lambda batch: {"pixel_values": batch["picture"]})
    with pytest.raises(DataError, match="^KeyError: 'picture'. The code of x .* Mend the dataset's __getitem__ or its"):
        labels_of(wrong, "x")


def test_preprocess_reads_lists_of_dicts_and_the_labels_as_stored():
    def as_is(images, return_tensors):
        return {"pixel_values": torch.stack([torch.tensor(np.asarray(image)).permute(2, 0, 1) / 1 for image in images])}

    rows = [{"image": np.full((4, 4, 3), 10 * row, np.uint8), "label": row % 2} for row in range(4)]
    for held in (rows, table(), table().with_format("torch")):
        data = preprocess(held, as_is, label_names=["a", "b"], name="x")
        assert data.pixel_values[:, 0, 0, 0].tolist() == [0.0, 10.0, 20.0, 30.0]
        assert data.labels.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("value,message", [
    (torch.zeros(1, 3, 4, 4), r"C x H x W, in .*, got shape \(1, 3, 4, 4\): .* Take its first element"),
    (torch.zeros(4, 4), r"C x H x W, in .*, got shape \(4, 4\)"),
    (torch.zeros(3, 4, 4, dtype=torch.uint8), "floating-point pixel_values in .*, got torch.uint8: preprocess"),
    (PILImage.new("RGB", (4, 4)), "pixel_values that are numbers in .*, got Image: preprocess the images"),
    ("a.png", "pixel_values that are numbers in .*, got str: preprocess the images"),
])
def test_pixels_that_are_none_say_what_to_do(value, message):
    with pytest.raises(DataError, match=message.replace(" in .*", " in row 0 of x")):
        check_sample([{"pixel_values": value, "labels": 0}], "x")
    with pytest.raises(DataError, match=message.replace(" in .*", " in image 1 of a batch")):
        collate_pixels([ROW, {"pixel_values": value, "labels": 0}])


def test_a_row_of_a_batch_that_lacks_a_column_is_named():
    with pytest.raises(DataError, match=r"a 'labels' column, got \['pixel_values'\] in image 1 of a batch"):
        collate_pixels([ROW, {"pixel_values": ROW["pixel_values"]}])


def test_a_path_that_leads_nowhere_is_named():
    rows = Dataset.from_dict({"image": ["a"], "label": [0]})
    with pytest.raises(DataError, match=r"an image in row 0 of x \(a\), got FileNotFoundError"):
        preprocess(rows, None, label_names=["a"], name="x")
