"""Classes of one source as retained, harmful and benign examples."""

from __future__ import annotations

import numpy as np
import pytest

from hf_immunize.diffusion.tasks import ConceptArguments, ConceptTask
from hf_immunize.errors import DataError


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "tiny.npz"
    images = np.random.default_rng(0).integers(0, 256, (200, 8, 8), dtype=np.uint8)
    np.savez(path, x_train=images, y_train=np.arange(200) % 10)
    return path


def test_classes_and_splits_of_an_archive_do_not_overlap_and_pixels_are_scaled(archive):
    task = ConceptTask(ConceptArguments(str(archive), image_size=8))
    assert task.source == "tiny.npz"
    held = {
        (side, split): task.examples(side, split)
        for side, splits in (("retain", ("train", "validation", "test")), ("harmful", ("defense", "attack", "test")))
        for split in splits
    }
    assert set(held["retain", "train"].labels.tolist()) <= set(range(8))
    assert set(held["harmful", "attack"].conditions["class_labels"].tolist()) == {9}
    rows = [row.numpy().tobytes() for examples in held.values() for row in examples.latents]
    assert len(set(rows)) == len(rows)
    pixels = held["retain", "train"].latents
    original = np.load(archive)["x_train"]
    restored = np.round((pixels[0, 0].numpy() + 1) * 127.5).astype(np.uint8)
    assert any(np.array_equal(restored, image) for image in original) and pixels.shape[1:] == (1, 8, 8)


def test_a_second_source_goes_on_counting_classes(archive, tmp_path):
    second = tmp_path / "second.npz"
    images = np.random.default_rng(1).integers(0, 256, (60, 8, 8), dtype=np.uint8)
    np.savez(second, images=images, labels=np.arange(60) % 3)
    both = ConceptArguments(f"{archive}, {second}", image_size=8, harmful_labels="10,12", benign_labels="11")
    task, alone = ConceptTask(both), ConceptTask(ConceptArguments(str(archive), image_size=8))
    assert task.source == "tiny.npz,second.npz" and task.label_names == [str(label) for label in range(13)]
    splits = ("defense", "attack", "validation", "test")
    assert {int(label) for split in splits for label in task.examples("harmful", split).labels} == {10, 12}
    drawn = {row.numpy().tobytes() for split in splits for row in task.examples("benign", split).latents}
    scaled = {(image[None].astype(np.float32) / 127.5 - 1).tobytes() for image in images[np.arange(60) % 3 == 1]}
    assert drawn == scaled
    mine, theirs = (held.examples("retain", "train") for held in (task, alone))
    assert mine.fingerprint(source="", role="").sha256 == theirs.fingerprint(source="", role="").sha256
    with pytest.raises(DataError, match="name of a dataset"):
        ConceptTask(ConceptArguments(" ,", image_size=8))


def test_scikit_learns_digits_need_no_download():
    task = ConceptTask(ConceptArguments("builder:digits", image_size=8, rows_per_class=20))
    assert sum(len(task.examples("benign", split)) for split in ("defense", "attack", "validation", "test")) == 20


@pytest.mark.parametrize("change,message", [
    ({"image_size": 28}, "set image_size and channels"),
    ({"channels": 3}, "in mode RGB"),
    ({"harmful_labels": "7"}, r"got \[7\] twice"),
    ({"harmful_labels": "12"}, r"got none of \[12\]"),
    ({"harmful_labels": "nine"}, "comma-separated class ids"),
])
def test_what_does_not_fit_is_named(archive, change, message):
    with pytest.raises(DataError, match=message):
        ConceptTask(ConceptArguments(str(archive), **{"image_size": 8, **change}))


def test_archives_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "broken.npz").write_bytes(b"PK broken")
    with pytest.raises(DataError, match="expected a readable .npz"):
        ConceptTask(ConceptArguments(str(tmp_path / "broken.npz")))
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(DataError, match=r"got \['a'\]"):
        ConceptTask(ConceptArguments(str(tmp_path / "other.npz")))


def test_images_of_another_source_and_generic_names(archive, tmp_path):
    second = tmp_path / "second.npz"
    images = np.random.default_rng(5).integers(0, 256, (30, 8, 8), dtype=np.uint8)
    np.savez(second, images=images, labels=np.arange(30) % 10)
    both = ConceptArguments(str(archive), image_size=8, other_dataset=str(second))
    known = ConceptTask(both).attacker_knows("harmful")
    scaled = {(images[row][None].astype(np.float32) / 127.5 - 1).tobytes() for row in (9, 19, 29)}
    assert {row.numpy().tobytes() for row in known["other_images"].latents} == scaled
    assert known["other"]["class_labels"].tolist() == [8] and known["generic"]["class_labels"].tolist() == [0]
    alone = ConceptTask(ConceptArguments(str(archive), image_size=8))
    assert alone.attacker_knows("benign")["other"]["class_labels"].tolist() == [9]
    assert "other_images" not in alone.attacker_knows("harmful") and "placeholder" not in known


@pytest.mark.parametrize("images,labels,message", [
    (np.zeros((3, 8, 8)), np.zeros(4), "got 3 images, 4 labels"),
    (np.zeros((0, 8, 8)), np.zeros(0), "got 0 images"),
    (np.full((3, 8, 8), 300, dtype=np.int16), np.zeros(3), "expected pixels in 0..255"),
    (np.zeros((3, 8, 8)), np.full(3, 0.5), "expected whole numbers as labels"),
])
def test_archives_whose_values_would_be_changed_are_refused(tmp_path, images, labels, message):
    np.savez(tmp_path / "odd.npz", images=images, labels=labels)
    with pytest.raises(DataError, match=message):
        ConceptTask(ConceptArguments(str(tmp_path / "odd.npz"), image_size=8))
    whole = (tmp_path / "odd.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:-30])
    with pytest.raises(DataError, match="readable .npz"):
        ConceptTask(ConceptArguments(str(tmp_path / "cut.npz"), image_size=8))
    with pytest.raises(DataError, match="rows_per_class of at least 1"):
        ConceptTask(ConceptArguments("builder:digits", image_size=8, rows_per_class=0))
