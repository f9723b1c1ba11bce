"""plan's look at the uplift: a probe on the base against those without it, on classes of which only one can tell."""

import numpy as np
import pytest
from PIL import Image
from transformers import ViTImageProcessorPil

from hf_immunize.data import TaskArguments
from hf_immunize.stages.checks.rows import read_side
from hf_immunize.stages.checks.uplift import check_uplift


@pytest.fixture
def processor():
    return ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def images(root, label_of):
    """Left and right edge dark or bright beside the other of both, on grey, with a little noise: as many pixels of each
    shade in every image. The class is a function of both edges."""
    draws = np.random.default_rng(0)
    for number in range(120):
        left, right = number % 2, number // 2 % 2
        row = [60 + 130 * left, 190 - 130 * left, 125, 125, 125, 125, 60 + 130 * right, 190 - 130 * right]
        pixels = np.repeat([row], 8, axis=0)[..., None].repeat(3, axis=2)
        folder = root / f"class {label_of(left, right)}"
        folder.mkdir(parents=True, exist_ok=True)
        noisy = np.clip(pixels + draws.normal(0, 8, pixels.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number}.png")
    return read_side(TaskArguments(str(root), str(root)), "harmful")


def test_a_base_that_tells_what_pixels_do_not_gives_uplift(tmp_path, make_vit, processor):
    """One of two is bright: no linear map of pixels or counts knows it, any network with a bend in it does."""
    make_vit().save_pretrained(tmp_path / "model")
    found = check_uplift(tmp_path / "model", processor, images(tmp_path / "harm", lambda left, right: left ^ right))
    gain = int(found.told.partition(" points")[0].rpartition(" ")[2])
    assert found.part == "uplift" and found.level == "ok" and gain > 30, found.told
    assert "from 120 images of 2 classes in" in found.told


def test_a_task_that_pixels_tell_has_nothing_to_protect(tmp_path, make_vit, processor):
    make_vit().save_pretrained(tmp_path / "model")
    found = check_uplift(tmp_path / "model", processor, images(tmp_path / "harm", lambda left, right: left))
    assert found.level == "note" and "NOTHING TO PROTECT" in found.told
    assert "on pixels or simple features 100 %" in found.told


def test_what_cannot_be_looked_at_says_why(tmp_path, make_vit, processor):
    side = images(tmp_path / "harm", lambda left, right: left)
    assert "unknown before the run" in check_uplift(None, processor, side).told
    (tmp_path / "model").mkdir()
    broken = check_uplift(tmp_path / "model", processor, side)
    assert broken.level == "note" and "could not be looked at: " in broken.told
