"""Bad images and labels are named before they can become numbers."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from hf_immunize.data import (
    PixelDataset,
    Task,
    TaskArguments,
    check_label_range,
    check_sample,
    collate_pixels,
    labels_of,
    preprocess,
)
from hf_immunize.errors import DataError

NAMES = ["a", "b"]


def processor(images, return_tensors):
    import numpy as np

    return {"pixel_values": torch.stack([torch.tensor(np.asarray(image)).permute(2, 0, 1) / 255 for image in images])}


def image_bytes(value: int) -> bytes:
    buffer = io.BytesIO()
    PILImage.new("L", (4, 4), value).save(buffer, "PNG")
    return buffer.getvalue()


def image_dataset(rows: list[bytes], labels: list[int]) -> Dataset:
    features = Features({"image": Image(), "label": Value("int64")})
    return Dataset.from_dict({"image": [{"bytes": row, "path": None} for row in rows], "label": labels}, features)


def test_preprocess_keeps_order_and_converts_grey_to_three_channels():
    data = preprocess(image_dataset([image_bytes(0), image_bytes(255)], [1, 0]), processor, label_names=NAMES, name="x")
    assert data.pixel_values.shape == (2, 3, 4, 4)
    assert data.pixel_values[:, 0, 0, 0].tolist() == [0.0, 1.0]
    assert data.labels.tolist() == [1, 0]


def test_an_image_that_cannot_be_decoded_is_named_by_its_row():
    broken = image_dataset([image_bytes(0), image_bytes(1)[:40]], [0, 1])
    with pytest.raises(DataError, match="an image in row 1 of harmful defense"):
        preprocess(broken, processor, label_names=NAMES, name="harmful defense")


def test_an_image_file_that_cannot_be_decoded_is_named_when_the_task_is_split(tmp_path):
    for place, label in enumerate("abab"):
        (tmp_path / label).mkdir(exist_ok=True)
        (tmp_path / label / f"{place}.png").write_bytes(image_bytes(place))
    (tmp_path / "b" / "3.png").write_bytes(image_bytes(3)[:40])
    with pytest.raises(DataError, match=r"an image in row 3 of the harmful dataset \(.*b.3\.png\)"):
        Task(TaskArguments("unused", str(tmp_path)), "harmful")


@pytest.mark.parametrize("column", ["image", "label"])
def test_a_missing_column_is_named_with_its_option(column):
    data = image_dataset([image_bytes(0)], [0]).rename_column(column, "other")
    with pytest.raises(DataError, match=f"expected column '{column}'.*set {column}_column"):
        preprocess(data, processor, label_names=NAMES, name="x")


def test_an_empty_dataset_is_refused():
    with pytest.raises(DataError, match="at least one row"):
        preprocess(image_dataset([], []), processor, label_names=NAMES, name="x")
    with pytest.raises(DataError, match="at least one row"):
        PixelDataset(torch.zeros(0, 3, 4, 4), torch.zeros(0), NAMES)
    with pytest.raises(DataError, match="at least one row"):
        labels_of([], "harmful_dataset")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_that_are_not_finite_name_their_row(value):
    pixels = torch.zeros(3, 3, 4, 4)
    pixels[1, 0, 0, 0] = value
    with pytest.raises(DataError, match="in row 1"):
        PixelDataset(pixels, torch.zeros(3), NAMES)
    with pytest.raises(DataError, match="in image 1 of a batch"):
        collate_pixels([{"pixel_values": image, "labels": 0} for image in pixels])


def test_labels_outside_their_range_name_their_row():
    with pytest.raises(DataError, match="got 2 in row 1"):
        PixelDataset(torch.zeros(2, 3, 4, 4), torch.tensor([0, 2]), NAMES)
    with pytest.raises(DataError, match="got -1 in row 0"):
        check_label_range([-1], 3, "x")
    with pytest.raises(DataError, match="at least two classes"):
        check_label_range([0], 1, "x")


def test_images_of_two_sizes_and_missing_keys_are_refused_by_the_collator():
    row = {"pixel_values": torch.zeros(3, 4, 4), "labels": 0}
    with pytest.raises(DataError, match="images of one size"):
        collate_pixels([row, {**row, "pixel_values": torch.zeros(3, 5, 5)}])
    with pytest.raises(DataError, match="expected a 'pixel_values' column"):
        collate_pixels([{"image": 0, "labels": 0}])
    with pytest.raises(DataError, match="expected a 'labels' column"):
        collate_pixels([{"pixel_values": torch.zeros(3, 4, 4)}])


def test_labels_are_found_in_every_kind_of_dataset():
    rows = [{"pixel_values": torch.zeros(3, 4, 4), "label": 1}]
    assert labels_of(rows, "x") == [1]
    assert labels_of(image_dataset([image_bytes(0)], [1]), "x") == [1]
    assert labels_of(PixelDataset(torch.zeros(1, 3, 4, 4), torch.tensor([1]), NAMES), "x") == [1]
    with pytest.raises(DataError, match="expected a 'labels' column in x, got \\['image'\\]"):
        labels_of([{"image": 0}], "x")
    with pytest.raises(DataError, match="one integer label per row"):
        labels_of([{"labels": "cat"}], "x")


def test_a_sample_without_pixels_says_to_preprocess():
    assert check_sample([{"pixel_values": torch.zeros(3, 4, 4)}], "x") == (3, 4, 4)
    with pytest.raises(DataError, match="preprocess the images"):
        check_sample([{"image": 0}], "x")


def test_transparent_parts_show_the_background_that_the_task_names(tmp_path):
    """Left half opaque, right half clear; the colour under the clear part is never seen."""
    from PIL import Image

    from hf_immunize.data import Task, TaskArguments

    for place in range(24):
        folder = tmp_path / "ab"[place % 2]
        folder.mkdir(exist_ok=True)
        image = Image.new("RGBA", (8, 8), (10 * place, 0, 0, 255))
        image.paste((0, 255, 0, 0), (4, 0, 8, 8))
        image.save(folder / f"{place}.png")

    def processor(images, **_):
        rows = [torch.tensor(np.array(image)).permute(2, 0, 1).float() for image in images]
        return {"pixel_values": torch.stack(rows)}

    for background, shown in (("white", (255, 255, 255)), ("#102030", (16, 32, 48))):
        told = TaskArguments(str(tmp_path), str(tmp_path), background=background)
        assert ("background" in told.described()) is (background != "white")
        for role in ("train", "validation", "test"):
            pixels = Task(told, "primary").pixels(role, processor).pixel_values
            assert torch.equal(pixels[..., 4:], torch.tensor(shown).float().view(3, 1, 1).expand(len(pixels), 3, 8, 4))
            assert bool((pixels[:, 1:, :, :4] == 0).all())
