"""Image processors of transformers asked so that what comes back is one tensor: one size, and the model's channels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.utils import logging

from hf_immunize.data.images import MODES
from hf_immunize.errors import DataError

logger = logging.get_logger(__name__)


def model_channels(model: Any) -> int | None:
    """``num_channels`` of a model's (vision) configuration where it is 1 or 3, else None."""
    config = getattr(model, "config", None)
    for part in (getattr(config, "vision_config", None), config):
        count = part.get("num_channels") if isinstance(part, Mapping) else getattr(part, "num_channels", None)
        if count in MODES:
            return int(count)
    return None


class PixelMaker:
    """Runs an image processor over batches of PIL images and keeps watch that all come out alike.

    Args:
        processor: image processor, called as ``processor(images, return_tensors="pt")["pixel_values"]``.
        channels: 1 or 3, the model's ``num_channels``; None: one where the processor's ``image_mean`` holds one number,
            else three.
        name: what to call the images in messages.

    Raises:
        DataError: ``channels`` other than 1 or 3, or a processor whose ``image_mean`` or ``image_std`` cannot be
            brought to that number: several different values for one channel.
    """

    def __init__(self, processor: Any, channels: int | None = None, name: str = "the images"):
        mean = _listed(getattr(processor, "image_mean", None))
        self._known = channels is not None or mean is not None
        if channels is None:
            channels = 1 if mean is not None and len(mean) == 1 else 3
        if channels not in MODES:
            raise DataError(f"expected a model with 1 or 3 channels for {name}, got channels={channels}.")
        self.channels, self.mode = int(channels), MODES[channels]
        self._processor, self._name, self._options = processor, name, _options(processor, self.channels)
        self._edge = _edge_without_crop(processor)
        self._shape: tuple[int, ...] | None = None
        self._first, self._cropped, self._seen = "", 0, 0

    def __call__(self, images: Sequence[Image.Image], place: Callable[[int], str] = "image {}".format) -> Tensor:
        """N×C×H×W pixels of images in ``mode``, in order; ``place`` is the name of an image in errors, by its number.

        Images of equal size go through the processor together. Where it resizes the shorter side and crops nothing, the
        central square of that side is kept.

        Raises:
            DataError: images that differ in size after the processor, or pixels of another number of channels.
        """
        sizes: dict[tuple[int, int], list[int]] = {}
        for number, image in enumerate(images):
            sizes.setdefault(image.size, []).append(number)
        rows: list[Any] = [None] * len(images)
        for chosen in sizes.values():
            made = self._square(self._processed([images[number] for number in chosen]))
            for number, pixels in zip(chosen, made, strict=True):
                rows[number] = pixels
        for number, (pixels, image) in enumerate(zip(rows, images, strict=True)):
            if self._shape == tuple(pixels.shape):
                continue
            told = f"{pixels.shape[-2]} x {pixels.shape[-1]} of {place(number)} ({image.height} x {image.width} before)"
            if self._shape is None:
                self._shape, self._first = tuple(pixels.shape), told
            else:
                raise DataError(
                    f"expected pixels of one size in {self._name}, got {self._first} and {told}: let the image "
                    "processor resize them (do_resize=True with size={'height': H, 'width': W}), or crop them "
                    "(do_center_crop=True with crop_size), or bring the images to one size."
                )
        self._seen += len(rows)
        return torch.stack(rows)

    def tell(self) -> None:
        """Log once how many images were cropped."""
        if self._cropped:
            logger.warning(
                f"{self._cropped} of {self._seen} images of {self._name} are not square, and the image processor "
                f"resizes the shorter side to {self._edge} and crops nothing: the central {self._edge} x {self._edge} "
                "pixels are used. Set size={'height': H, 'width': W} in the processor to squeeze them instead."
            )

    def _processed(self, images: list[Image.Image]) -> Tensor:
        try:
            made = self._processor(images, return_tensors="pt", **self._options)
            pixels = torch.as_tensor(made["pixel_values"])
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"expected an image processor that makes pixel_values of {self.mode} images in {self._name}, got "
                f"{type(error).__name__}: {error}"
            ) from error
        wrong = self._known and pixels.shape[1:2] != (self.channels,)
        if pixels.dim() != 4 or len(pixels) != len(images) or wrong:
            raise DataError(
                f"expected {len(images)} x {self.channels} x H x W pixels from the image processor in {self._name}, "
                f"got {tuple(pixels.shape)}: the model and its processor must agree in the number of channels "
                "(num_channels of the model; image_mean, image_std and do_convert_rgb of the processor)."
            )
        return pixels

    def _square(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[-2:]
        edge = self._edge
        if edge is None or height == width or min(height, width) != edge:
            return pixels
        self._cropped += len(pixels)
        top, left = (height - edge) // 2, (width - edge) // 2
        return pixels[..., top : top + edge, left : left + edge]


def _listed(value: Any) -> list[float] | None:
    """A mean or standard deviation by channel; None where there is none or one for all channels."""
    return [float(part) for part in value] if isinstance(value, Sequence) and not isinstance(value, str) else None


def _options(processor: Any, channels: int) -> dict[str, Any]:
    """What a processor made for another number of channels has to be told in each call."""
    told: dict[str, Any] = {}
    for name in ("image_mean", "image_std"):
        values = _listed(getattr(processor, name, None))
        if values is None or len(values) == channels:
            continue
        if len(set(values)) > 1:
            raise DataError(
                f"expected {name} of {channels} numbers in the image processor of a model with {channels} channels, "
                f"got {values}: give the processor that was saved with the model, or set image_mean and image_std."
            )
        told[name] = values[:1] * channels
    if channels == 1 and getattr(processor, "do_convert_rgb", None):
        told["do_convert_rgb"] = False
    return told


def _edge_without_crop(processor: Any) -> int | None:
    """The side to which a processor resizes the shorter side of images, where it leaves the longer one."""
    size: Any = getattr(processor, "size", None)
    edge = size.get("shortest_edge") if hasattr(size, "get") else None
    others = any(getattr(processor, name, None) for name in ("do_center_crop", "do_pad"))
    return int(edge) if edge and getattr(processor, "do_resize", None) and not others else None
