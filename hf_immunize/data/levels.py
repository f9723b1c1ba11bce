"""Pixel values of any depth as levels of 8 bits, by a rule that the type of the values decides and no single image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers.utils import logging

from hf_immunize.errors import DataError

logger = logging.get_logger(__name__)

FULL_16 = 65535
_SMALL_PART = 0.25
_BLACK = 1 / 255


class ImageFault(DataError):
    """An image that cannot become levels of 8 bits: what was found, and what to do about it.

    Readers of many images name the row or the file and repeat ``told``.
    """

    def __init__(self, got: str, remedy: str = ""):
        self.got, self.remedy = got, remedy
        super().__init__(f"expected an image that can be read, got {self.told}.")

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.got, self.remedy)

    @property
    def told(self) -> str:
        """What was found and the remedy, as the end of a sentence."""
        return f"{self.got}: {self.remedy}" if self.remedy else self.got


@dataclass
class ImageTally:
    """What a reader of many images tells its user once: how deep they are, what is transparent, what is left out."""

    images: int = 0
    deep: int = 0
    lowest: float = 1.0
    highest: float = 0.0
    transparent: int = 0
    frames: int = 0

    def add_range(self, lowest: float, highest: float) -> None:
        """One image that was scaled to 8 bits: the part of its type's range, 0..1, in which its values lie."""
        self.deep += 1
        self.lowest, self.highest = min(self.lowest, lowest), max(self.highest, highest)

    def tell(self, name: str, background: str | tuple[int, int, int]) -> None:
        """Log what is worth knowing of the images of ``name``, each thing once.

        Raises:
            DataError: scaled images that hold nothing but the levels 0 and 1 of 255 all together.
        """
        part = f"{self.deep} of {self.images} images of {name}"
        if self.deep and 0 < self.highest <= _BLACK:
            raise DataError(
                f"expected images that use their type's range in {name}, got at most {100 * self.highest:.2g} % of it: "
                "scaled to 8 bits they would be black. If they hold levels of 0..255, save them as 8-bit images "
                "(uint8); if they hold 0 and 1, as bool or multiplied by 255."
            )
        if self.deep and self.highest > 0 and self.highest - self.lowest < _SMALL_PART:
            logger.warning(
                f"{part} are scaled to 8 bits by the whole range of their type (value/257 for 16 bits) and use only "
                f"{100 * self.lowest:.2g} to {100 * self.highest:.2g} % of it, which leaves few levels. If they hold "
                "fewer bits than their type, stretch them and save them with 8 bits."
            )
        if self.transparent:
            logger.warning(f"{self.transparent} of {self.images} images of {name} have transparent parts, which show "
                           f"the background: {background}.")
        if self.frames:
            logger.warning(f"{self.frames} of {self.images} images of {name} hold several frames or pages: the first "
                           "of each is used.")


def from_full_range(values: np.ndarray, full: int = FULL_16) -> np.ndarray:
    """Integers of 0..full as uint8: the nearest level of 255·value/full, which is value/257 for 16 bits."""
    return ((values.astype(np.int64) * 255 + full // 2) // full).astype(np.uint8)


def to_levels(values: np.ndarray, tally: ImageTally | None = None, *, whole_dataset: bool = False) -> np.ndarray:
    """Pixel values of any dtype as uint8 of the same shape.

    - uint8: as they are; bool: 0 and 255;
    - uint16: all 65536 values are the range, value/257 rounded;
    - other integers: levels of 0..255;
    - floating-point: 0..1, times 255 and rounded.

    Args:
        tally: where to note what part of the range is used.
        whole_dataset: the values are all images of a dataset and not one, so that integers of any type that stay in
            0..255, and floating-point numbers that do and are whole, are known to be levels.

    Raises:
        ImageFault: values outside their range, NaN, or something that is not numbers.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    if values.dtype.kind not in "uif" or values.size == 0:
        raise ImageFault(f"values of type {values.dtype} and shape {values.shape}", "give uint8, uint16, bool or float")
    low, high = values.min(), values.max()
    kind, levels = values.dtype.kind, bool(0 <= low and high <= 255)
    if kind == "f" and not (bool(np.isfinite(low)) and bool(np.isfinite(high))):
        raise ImageFault("NaN or infinity among its values", "remove it or repair it")
    if kind == "f" and low >= 0 and high <= 1:
        _note(tally, float(low), float(high))
        return np.rint(values.astype(np.float64) * 255).astype(np.uint8)
    if whole_dataset and levels and (kind != "f" or bool((values == np.rint(values)).all())):
        return values.astype(np.uint8)
    if kind == "u" and values.dtype.itemsize == 2:  # in either byte order
        _note(tally, int(low) / FULL_16, int(high) / FULL_16)
        return from_full_range(values)
    if kind != "f" and levels:
        _note(tally, int(low) / 255, int(high) / 255)
        return values.astype(np.uint8)
    wanted = "0..1 (or convert levels of 0..255 to uint8)" if kind == "f" else "0..255 (or convert 16 bits to uint16)"
    raise ImageFault(f"{values.dtype} values in {low:g}..{high:g}", f"bring them to {wanted}")


def _note(tally: ImageTally | None, low: float, high: float) -> None:
    if tally is not None:
        tally.add_range(low, high)


def channels_last(array: np.ndarray) -> np.ndarray:
    """One image as H×W, H×W×2, H×W×3 or H×W×4, channels last, from any of the usual layouts.

    The axis of channels is the first or the last: one of 3 or 1 counts before one of 4 or 2 (with alpha).

    Raises:
        ImageFault: no such axis, both ends could be it, or an image without pixels.
    """
    remedy = "give H x W, H x W x C or C x H x W with C of 1, 2, 3 or 4, or a PIL image"
    if array.size == 0 or array.ndim not in (2, 3):
        raise ImageFault(f"an array of shape {array.shape}", remedy)
    if array.ndim == 2:
        return array
    for counts in ((1, 3), (2, 4)):
        ends = [end for end in (0, -1) if array.shape[end] in counts]
        if len(ends) == 2:
            raise ImageFault(f"an array of shape {array.shape}, whose first and last axis could be channels", remedy)
        if ends:
            moved = np.moveaxis(array, ends[0], -1)
            return moved[..., 0] if moved.shape[-1] == 1 else moved
    raise ImageFault(f"an array of shape {array.shape}", remedy)


def as_array(value: Any) -> np.ndarray:
    """A tensor, array or nested list as a numpy array. Raises ImageFault for what is none."""
    import torch

    try:
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu()
            value = (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).numpy()
        return np.asarray(value)
    except (ValueError, TypeError) as error:
        raise ImageFault(f"{type(value).__name__} ({error})", "give one array of numbers for each image") from error
