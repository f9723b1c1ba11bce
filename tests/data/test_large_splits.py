"""Splits larger than what is kept: images are decoded when they are read, passes over all of them are made once."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from hf_immunize.data import (
    ImagePixels,
    PixelDataset,
    Task,
    TaskArguments,
    batches,
    collate_pixels,
    digest_rows,
    fingerprint,
    for_model,
    load_source,
    near_duplicates,
    preprocess,
)
from hf_immunize.data import caching as passes
from hf_immunize.errors import DataError

ROWS = 24


class Processor:
    """Counts the images it has made pixels of."""

    seen = 0

    def __call__(self, images, return_tensors):
        Processor.seen += len(images)
        return {"pixel_values": torch.stack([torch.tensor(np.array(i)).permute(2, 0, 1) / 255 for i in images])}

    def __repr__(self) -> str:
        return "by 255"


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for row in range(ROWS):
        place = tmp_path / "images" / "abc"[row % 3]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(place / f"{row:02d}.png")
    return tmp_path / "images"


@pytest.fixture
def every_pass_is_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(passes, "MANY", 1)
    monkeypatch.setenv("HF_IMMUNIZE_CACHE", str(tmp_path / "cache"))


def read(folder, keep_bytes: int) -> PixelDataset:
    rows = load_source(str(folder))
    return preprocess(rows, Processor(), label_names=["a", "b", "c"], name="x", keep_bytes=keep_bytes, batch_size=5)


def test_rows_are_those_of_a_split_that_is_kept(folder):
    kept, lazy = read(folder, 2**26), read(folder, 0)
    assert type(kept) is PixelDataset and type(lazy) is ImagePixels and len(lazy) == ROWS
    assert not any(isinstance(value, torch.Tensor) and value.dim() == 4 for value in vars(lazy).values())
    assert torch.equal(lazy.pixel_values, kept.pixel_values) and torch.equal(lazy.labels, kept.labels)
    assert lazy.image_shape == kept.image_shape == (3, 40, 40)
    assert torch.equal(lazy[7]["pixel_values"], kept[7]["pixel_values"]) and lazy[7]["labels"] == kept[7]["labels"]
    told = [fingerprint(held, source="s", role="r") for held in (kept, lazy)]
    assert told[0] == told[1] and digest_rows(kept, "x") == digest_rows(lazy, "x")
    for held in zip(batches(kept, 7), batches(lazy, 7), strict=True):
        assert torch.equal(held[0]["pixel_values"], held[1]["pixel_values"])
    rows = torch.tensor([9, 3, 20])
    assert torch.equal(lazy.subset(rows).pixel_values, kept.subset(rows).pixel_values)
    assert torch.equal(lazy.subset(rows).subset(torch.tensor([2])).labels, kept.labels[20:21])
    names = {0: "c", 1: "b", 2: "a"}
    assert torch.equal(for_model(lazy, names).labels, for_model(kept, names).labels)
    assert type(for_model(lazy, names)) is ImagePixels and type(lazy.loaded()) is PixelDataset


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_decode(folder, workers):
    kept, lazy = read(folder, 2**26), read(folder, 0)
    Processor.seen = 0
    loader = DataLoader(lazy, batch_size=6, num_workers=workers, collate_fn=collate_pixels)
    found = torch.cat([batch["pixel_values"] for batch in loader])
    assert torch.equal(found, kept.pixel_values)
    assert Processor.seen == (0 if workers else ROWS)  # of this process


def test_only_the_first_images_are_looked_at_before(folder):
    Processor.seen = 0
    read(folder, 0)
    assert Processor.seen == 5
    (folder / "c" / "23.png").write_bytes(b"no image")
    lazy = read(folder, 0)
    with pytest.raises(DataError, match=r"an image in row 23 of x \(.*23\.png\)"):
        lazy[23]
    Image.new("RGB", (8, 8)).save(folder / "c" / "20.png")
    row = [path["path"] for path in _stored(folder)].index(str(folder / "c" / "20.png"))
    with pytest.raises(DataError, match=rf"pixels of one size in x, got 40 x 40 of row 0 .* and 8 x 8 of row {row}"):
        read(folder, 0)[row]


def _stored(folder):
    from datasets import Image as Feature

    return load_source(str(folder)).cast_column("image", Feature(decode=False))["image"]


def test_a_pass_for_digests_is_made_once_until_a_file_changes(folder, every_pass_is_kept):
    first = fingerprint(read(folder, 0), source="s", role="r")
    Processor.seen = 0
    lazy = read(folder, 0)
    assert fingerprint(lazy, source="s", role="r") == first and Processor.seen == 5
    assert fingerprint(lazy.subset(torch.arange(9)), source="s", role="r").sha256 != first.sha256
    path = folder / "a" / "00.png"
    changed = np.array(Image.open(path))
    changed[0, 0] ^= 1
    Image.fromarray(changed).save(path)
    os.utime(path, ns=(1, 1))
    other = fingerprint(read(folder, 0), source="s", role="r")
    assert other.sha256 != first.sha256 and other == fingerprint(read(folder, 2**26), source="s", role="r")


def test_the_pass_that_splits_a_task_is_made_once(folder, every_pass_is_kept, monkeypatch):
    arguments = TaskArguments("unused", str(folder), harmful_splits="defense=0.5,attack=0.5")
    assert "preprocessing_workers" not in arguments.described()
    first = Task(arguments, "harmful")

    def never(*args, **kwargs):
        raise AssertionError("read again")

    with monkeypatch.context() as context:
        context.setattr(near_duplicates, "read_image", never)
        again = Task(arguments, "harmful")
    monkeypatch.setattr(passes, "MANY", 10**9)
    plain = Task(TaskArguments("unused", str(folder), harmful_splits="defense=0.5,attack=0.5",
                               preprocessing_workers=1), "harmful")
    for other in (again, plain):
        for split, (looks, rows) in first.looks().items():
            theirs, their_rows = other.looks()[split]
            assert rows == their_rows and looks.contents == theirs.contents
            assert np.array_equal(looks.thumbnails, theirs.thumbnails) and looks.thumbnails.any()
            assert np.array_equal(looks.compared, theirs.compared) and looks.compared.all()


def test_what_may_have_changed_unseen_has_no_key(folder):
    rows = load_source(str(folder))
    assert passes.identity_of(rows, "image") == passes.identity_of(load_source(str(folder)), "image")
    assert passes.identity_of(rows, "image", "other words") != passes.identity_of(rows, "image")
    assert passes.identity_of(rows.with_transform(lambda batch: batch), "image") is None
    assert passes.identity_of([{"image": 0}], "image") is None
