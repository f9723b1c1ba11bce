"""Ordinary 8-bit RGB and grey images are what they were before all readers shared one conversion."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageOps
from transformers import ViTImageProcessorPil

from hf_immunize.data import Task, TaskArguments, load_source, read_image
from hf_immunize.data.fingerprint import digest_pixels
from hf_immunize.diffusion.photos import read_pixels
from hf_immunize.diffusion.tasks import ConceptArguments, ConceptTask

BEFORE = {
    ("primary", "train"): "8e21ff2526f65db7166fcd6bdebcea1fbde5e3df7425412c775396cdd4e4629e",
    ("harmful", "defense"): "27f2d7e128de7fd466b1a40a08a70fb47163ba34c61ab849d73b5ea267a89e65",
    ("harmful", "test"): "0b72c6188ed678cad5bd2cfa0777c223fb38b4a8f53b4aa2adbfc0070e204695",
}


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for place in range(60):
        shape = (12, 17, 3) if place % 2 else (12, 17)
        (tmp_path / "ab"[place % 2]).mkdir(exist_ok=True)
        image = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        image.save(tmp_path / "ab"[place % 2] / f"{place}.{'png' if place % 3 else 'jpg'}")
    return tmp_path


def test_fingerprints_of_the_digits(digits_primary):
    primary, harmful, processor = digits_primary
    for (side, role), sha256 in BEFORE.items():
        task = primary if side == "primary" else harmful
        assert task.fingerprint(task.pixels(role, processor), role).sha256 == sha256
    concept = ConceptTask(ConceptArguments("builder:digits", image_size=8)).examples("harmful", "test")
    assert concept.fingerprint(source="", role="").sha256 == (
        "c600e03fd6c7c13230e5561c6fd3f875b28fa56a688e825b2459ba4cf55b079c")


def test_content_hashes_and_pixels_of_folders_of_png_and_jpeg(folder):
    """The truth is the line that every reader had before: Pillow's own conversion of what datasets decodes."""
    held = load_source(str(folder))
    for row in range(len(held)):
        truth = digest_pixels(np.asarray(held[row]["image"].convert("RGB")))
        assert digest_pixels(np.asarray(read_image(held, row, "image", "x"))) == truth
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    task = Task(TaskArguments("unused", str(folder)), "harmful")
    for role in ("defense", "attack", "validation", "test"):
        images = [row["image"].convert("RGB") for row in task._splits[role]]
        truth = processor(images, return_tensors="pt")["pixel_values"]
        assert np.array_equal(task.pixels(role, processor).pixel_values, truth)
    files = sorted((folder / "a").glob("*"))
    fitted = [ImageOps.fit(ImageOps.exif_transpose(Image.open(file)).convert("RGB"), (16, 16)) for file in files]
    truth = np.stack([np.asarray(image).astype(np.float32) / 127.5 - 1 for image in fitted]).transpose(0, 3, 1, 2)
    assert np.array_equal(read_pixels(folder / "a", 16).numpy(), truth)


def test_sixteen_bit_and_transparent_folders_go_through_a_whole_task(tmp_path):
    """Class centres 1584 and 2283 of a 16-bit grey PNG, and ink on a clear ground: both were one colour before."""
    rng = np.random.default_rng(0)
    for place in range(40):
        label = place % 2
        (tmp_path / "ab"[label]).mkdir(exist_ok=True)
        values = (1584 if label == 0 else 2283) * 20 + rng.integers(-300, 300, (6, 6))
        Image.fromarray(values.astype(np.uint16)).save(tmp_path / "ab"[label] / f"{place}.png")
    processor = ViTImageProcessorPil(size={"height": 6, "width": 6}, image_mean=[0.0] * 3, image_std=[1.0] * 3)
    found = Task(TaskArguments("unused", str(tmp_path)), "harmful").pixels("defense", processor)
    for label, centre in ((0, 1584 * 20), (1, 2283 * 20)):
        levels = found.pixel_values[found.labels == label] * 255
        assert abs(float(levels.mean()) - centre / 257) < 1 and float(levels.std()) > 0.3
