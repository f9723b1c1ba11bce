"""Image processors without a crop, without a resize, for one channel: one size, the model's channels, or an error."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from transformers import ConvNextImageProcessorPil, ViTImageProcessorPil

from hf_immunize.data import PixelMaker, model_channels, preprocess
from hf_immunize.errors import DataError

PLAIN = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}


def noise(*sizes: tuple[int, int], seed: int = 0, mode: str = "RGB") -> list[PILImage.Image]:
    """Images of (width, height)."""
    rng = np.random.default_rng(seed)
    return [PILImage.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)
            for width, height in sizes]


def table(images: list[PILImage.Image]) -> Dataset:
    features = Features({"image": Image(), "label": Value("int64")})
    return Dataset.from_dict({"image": images, "label": [0] * len(images)}, features)


def pixels(images, processor, **options) -> torch.Tensor:
    return preprocess(table(images), processor, label_names=["a"], name="x", **options).pixel_values


def test_the_central_square_of_a_processor_without_crop_is_used_and_told_once(caplog):
    """'inhomogeneous shape' before."""
    images = noise((60, 40), (40, 60), (50, 50), (33, 32), (60, 40))
    processor = ViTImageProcessorPil(size={"shortest_edge": 32}, **PLAIN)
    with caplog.at_level(logging.WARNING):
        found = pixels(images, processor, batch_size=2)
    assert found.shape == (5, 3, 32, 32)
    for image, one in zip(images, found, strict=True):
        short = min(image.size)
        size = (image.width * 32 // short, image.height * 32 // short)
        resized = np.asarray(image.resize(size, PILImage.Resampling.BILINEAR)).astype(np.float32) / 255
        top, left = (size[1] - 32) // 2, (size[0] - 32) // 2
        assert np.allclose(one.permute(1, 2, 0), resized[top : top + 32, left : left + 32], atol=1e-6)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1 and "4 of 5 images of x are not square" in told[0] and "central 32 x 32" in told[0]


@pytest.mark.parametrize("processor", [
    ViTImageProcessorPil(size={"height": 8, "width": 8}),
    ViTImageProcessorPil(size={"shortest_edge": 16}, do_center_crop=True, crop_size={"height": 12, "width": 12}),
    ConvNextImageProcessorPil(size={"shortest_edge": 32}),
    ConvNextImageProcessorPil(size={"shortest_edge": 384}),
], ids=["size", "crop", "convnext", "convnext 384"])
def test_processors_that_bring_images_to_one_size_are_not_touched(processor, caplog):
    images = noise((60, 40), (40, 60), (50, 50))
    with caplog.at_level(logging.WARNING):
        found = pixels(images, processor)
    assert torch.equal(found, processor(images, return_tensors="pt")["pixel_values"]) and not caplog.records


def test_two_sizes_without_resizing_name_both_rows_and_files(tmp_path):
    files = []
    for place, image in enumerate(noise((9, 7), (9, 7), (8, 7))):
        image.save(tmp_path / f"{place}.png")
        files.append(str(tmp_path / f"{place}.png"))
    processor = ViTImageProcessorPil(do_resize=False)
    with pytest.raises(DataError, match=r"one size in x, got 7 x 9 of row 0 \(.*0\.png\) .* and 7 x 8 of row 2 \("
                                        r".*2\.png\).*: let the image processor resize them \(do_resize=True"):
        pixels(files, processor)
    with pytest.raises(DataError, match="got 7 x 9 of row 0 .* and 7 x 8 of row 2"):
        pixels(files, processor, batch_size=1)
    assert pixels(files[:2], processor).shape == (2, 3, 7, 9)


def grey_truth(images, side: int) -> np.ndarray:
    return np.stack([np.asarray(image.convert("L").resize((side, side), PILImage.Resampling.BILINEAR))
                     for image in images]).astype(np.float32) / 255


@pytest.mark.parametrize("options", [{}, {"channels": 1}], ids=["inferred", "named"])
@pytest.mark.parametrize("convert", [None, True, False])
def test_a_processor_for_one_channel_gets_grey_images(options, convert):
    """'mean must have 3 elements' before."""
    images = noise((20, 20), (30, 30))
    processor = ViTImageProcessorPil(
        size={"height": 8, "width": 8}, image_mean=[0.25], image_std=[0.5], do_convert_rgb=convert)
    found = pixels(images, processor, **options)
    assert found.shape == (2, 1, 8, 8)
    assert np.allclose(found[:, 0], (grey_truth(images, 8) - 0.25) / 0.5, atol=1e-5)


def test_equal_means_serve_another_number_of_channels_and_different_ones_are_refused():
    images, size = noise((20, 20)), {"height": 8, "width": 8}
    three = ViTImageProcessorPil(size=size, image_mean=[0.25] * 3, image_std=[0.5] * 3)
    one = ViTImageProcessorPil(size=size, image_mean=[0.25], image_std=[0.5])
    assert torch.equal(pixels(images, three, channels=1), pixels(images, one))
    assert torch.equal(pixels(images, one, channels=3), pixels(images, three))
    clip = ViTImageProcessorPil(size=size, image_mean=[0.48, 0.46, 0.41], image_std=[0.27, 0.26, 0.28])
    with pytest.raises(DataError, match=r"image_mean of 1 numbers .* with 1 channels, got \[0.48, 0.46, 0.41\]"):
        pixels(images, clip, channels=1)
    with pytest.raises(DataError, match="a model with 1 or 3 channels for x, got channels=4"):
        pixels(images, clip, channels=4)


def test_a_processor_that_gives_other_channels_than_the_model_takes_is_refused():
    def colour(images, return_tensors):
        return {"pixel_values": torch.zeros(len(images), 3, 8, 8)}

    with pytest.raises(DataError, match=r"1 x 1 x H x W pixels from the image processor in x, got \(1, 3, 8, 8\)"):
        pixels(noise((8, 8)), colour, channels=1)
    with pytest.raises(DataError, match="makes pixel_values of RGB images in x, got KeyError: 'pixel_values'"):
        pixels(noise((8, 8)), lambda images, return_tensors: {"flattened_patches": 0})


def test_the_channels_of_a_model_are_those_of_its_vision_part():
    class Model:
        def __init__(self, **config):
            self.config = type("Config", (), config)()

    assert model_channels(Model(num_channels=1)) == 1 and model_channels(Model(num_channels=3)) == 3
    assert model_channels(Model(vision_config={"num_channels": 1}, num_channels=3)) == 1
    assert model_channels(Model(num_channels=4)) is None and model_channels(object()) is None


def test_images_keep_their_order_whatever_their_sizes():
    images = [PILImage.new("RGB", (8 + place % 3, 8), (10 * place,) * 3) for place in range(9)]
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8}, **PLAIN)
    found = PixelMaker(processor)(images) * 255
    assert found.round()[:, 0, 0, 0].tolist() == [10.0 * place for place in range(9)]
