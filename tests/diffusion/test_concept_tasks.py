"""Classes of one source as retained, harmful and benign examples."""

from __future__ import annotations

import numpy as np
import pytest

from hf_immunize.diffusion.tasks import ConceptArguments, ConceptTask, read_images
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


@pytest.mark.parametrize("form", ["uint8", "bool", "uint16", "int64 levels", "uint16 levels", "float 0..1",
                                  "float levels", "N x H x W x 1", "N x 1 x H x W"])
def test_grey_archives_of_every_type_and_layout(tmp_path, form):
    rng = np.random.default_rng(0)
    levels, deep = rng.integers(0, 256, (20, 8, 8)), rng.integers(0, 65536, (20, 8, 8)).astype(np.uint16)
    images, truth = {
        "uint8": lambda: (levels.astype(np.uint8), levels),
        "bool": lambda: (levels > 127, (levels > 127) * 255),
        "uint16": lambda: (deep, np.rint(deep / 257)),
        "int64 levels": lambda: (levels, levels),
        "uint16 levels": lambda: (levels.astype(np.uint16), levels),
        "float 0..1": lambda: ((levels / 255).astype(np.float32), levels),
        "float levels": lambda: (levels.astype(np.float64), levels),
        "N x H x W x 1": lambda: (levels.astype(np.uint8)[..., None], levels),
        "N x 1 x H x W": lambda: (levels.astype(np.uint8)[:, None], levels),
    }[form]()
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(20) % 10)
    assert np.array_equal(read_images(ConceptArguments(str(tmp_path / "a.npz"), image_size=8)).images, truth)


@pytest.mark.parametrize("form", ["last", "first", "alpha", "alpha first", "uint16"])
def test_colour_archives_of_every_layout(tmp_path, form, caplog):
    rng = np.random.default_rng(0)
    colour, alpha = rng.integers(0, 256, (6, 8, 8, 3)), rng.choice([0, 99, 255], (6, 8, 8, 1))
    shown = np.rint((colour * alpha + 255 * (255 - alpha)) / 255)
    images, truth = {
        "last": (colour, colour), "first": (np.moveaxis(colour, -1, 1), colour),
        "alpha": (np.concatenate([colour, alpha], -1), shown),
        "alpha first": (np.moveaxis(np.concatenate([colour, alpha], -1), -1, 1), shown),
        "uint16": (colour * 257, colour),
    }[form]
    images = images.astype(np.uint16 if form == "uint16" else np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(6))
    with caplog.at_level("WARNING"):
        found = read_images(ConceptArguments(str(tmp_path / "a.npz"), image_size=8, channels=3)).images
    assert np.array_equal(found, truth)
    assert ("6 of 6 images of a.npz have transparent parts" in caplog.text) == form.startswith("alpha")


@pytest.mark.parametrize("images,message", [
    (np.eye(8, dtype=np.uint8)[None].repeat(10, 0), "got no other levels than 0 and 1, which are both black: multiply"),
    (np.full((10, 8, 8), 100.5), "got float64 values in 100.5..100.5: bring them to 0..1"),
    (np.full((10, 8, 8), np.nan), "NaN or infinity"),
    (np.full((10, 8, 8), 70000), "got int64 values in 70000..70000"),
    (np.full((10, 8, 8), "a"), "values of type <U1"),
])
def test_archives_whose_levels_cannot_be_known_are_refused(tmp_path, images, message):
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(10))
    with pytest.raises(DataError, match=message):
        read_images(ConceptArguments(str(tmp_path / "a.npz"), image_size=8))


def test_archives_that_use_little_of_sixteen_bits_say_so(tmp_path, caplog):
    np.savez(tmp_path / "a.npz", images=np.tile(np.array([1584, 2283], np.uint16), (10, 8, 4)), labels=np.arange(10))
    with caplog.at_level("WARNING"):
        found = read_images(ConceptArguments(str(tmp_path / "a.npz"), image_size=8)).images
    assert np.unique(found).tolist() == [6, 9]
    assert "10 of 10 images of a.npz are scaled" in caplog.text and "2.4 to 3.5 % of it" in caplog.text
    with pytest.raises(DataError, match="channels of 1 .grey. or 3 .colour., got 2"):
        read_images(ConceptArguments(str(tmp_path / "a.npz"), image_size=8, channels=2))
