"""Images as 8-bit RGB or grey: one rule for depth, colour model, transparency and orientation, for every reader.

In this order: the first frame is decoded, turned as its EXIF orientation says, scaled to 8 bits by the whole range of
its type, put on a background where it is transparent, and converted by Pillow. Colour profiles are not applied.
"""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from hf_immunize.data.levels import (
    FULL_16,
    ImageFault,
    ImageTally,
    as_array,
    channels_last,
    from_full_range,
    to_levels,
)
from hf_immunize.errors import ConfigError

BACKGROUND = "white"
MODES = {1: "L", 3: "RGB"}
"""Mode by number of channels."""
_SAVE_AGAIN = "save it with 8 bits a channel, or with 16 and its whole range"
_PNG_LEVELS = {"L;2": 85, "L;4": 17}


def decode_image(
    value: Any, mode: str = "RGB", *, background: str | tuple[int, int, int] = BACKGROUND,
    tally: ImageTally | None = None,
) -> Image.Image:
    """What a row or a file holds as one RGB or grey image, as ``convert_image`` makes it.

    Args:
        value: a PIL image; the bytes of a file; its path; ``{"bytes", "path"}`` as ``datasets`` stores images; or
            pixels as an array, tensor or nested list, see ``to_levels`` and ``channels_last``.
        mode, background, tally: as in ``convert_image``.

    Raises:
        ImageFault: nothing that can be decoded, with what to do.
        ConfigError: an unknown mode or background.
    """
    if isinstance(value, Image.Image):
        opened = value
    elif isinstance(value, bytes | bytearray | str | PathLike | Mapping):
        opened = _open(value)
    elif isinstance(value, tuple) or value is None:
        raise ImageFault(
            "nothing" if value is None else f"a tuple of {[type(part).__name__ for part in value]}",
            "remove the row, or give it an image" if value is None else "give one image",
        )
    else:
        opened = Image.fromarray(to_levels(channels_last(as_array(value)), tally))
    return convert_image(opened, mode, background=background, tally=tally)


def _open(value: Any) -> Image.Image:
    data: Any
    path: Any
    if isinstance(value, Mapping):
        data, path = value.get("bytes"), value.get("path")
    else:
        data, path = (value, None) if isinstance(value, bytes | bytearray) else (None, value)
    if data is None and path is None:
        raise ImageFault(f"{value!r:.60}", "give the bytes of a file or its path")
    try:
        if data is None and "://" in str(path):
            from datasets import Image as Remote

            return Remote().decode_example({"path": str(path), "bytes": None})
        data = Path(path).read_bytes() if data is None else data
        return Image.open(BytesIO(data))
    except FileNotFoundError as error:
        remedy = "check the path, which starts in the working directory"
        raise ImageFault(f"{type(error).__name__}: {error}", remedy) from error
    except UnidentifiedImageError as error:
        raise ImageFault(f"{type(error).__name__} for {len(data or b'')} bytes", "remove or replace it") from error
    except MemoryError:
        raise
    except Exception as error:
        raise _broken(error) from error


def _broken(error: Exception) -> ImageFault:
    """Pillow's decoders raise many unrelated classes for a file that is broken."""
    if isinstance(error, Image.DecompressionBombError):
        remedy = "shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
    else:
        remedy = "remove or replace it"
    return ImageFault(f"{type(error).__name__}: {error}".rstrip("."), remedy)


def convert_image(
    image: Image.Image, mode: str = "RGB", *, background: str | tuple[int, int, int] = BACKGROUND,
    tally: ImageTally | None = None,
) -> Image.Image:
    """A PIL image of any mode as 8-bit ``RGB`` or grey ``L``; the image itself stays as it is.

    16 bits are scaled by the whole range, value/257 rounded; the 16 bits of a colour file are cut to the upper 8, which
    is all that Pillow reads. Transparent parts show ``background``: (c·α + b·(255 − α))/255, rounded. Grey is
    0.299 R + 0.587 G + 0.114 B (ITU-R 601).

    Args:
        image: PIL image; of one with several frames the current one, which is the first of a file just opened.
        mode: ``RGB`` or ``L``.
        background: a colour that Pillow knows (``white``, ``#rrggbb``) or three numbers of 0..255.
        tally: notes what a reader of many images tells its user.

    Raises:
        ImageFault: a file that is broken, or a mode whose range cannot be known (``F``, ``I`` outside 0..65535).
        ConfigError: an unknown mode or background.
    """
    if mode not in MODES.values():
        raise ConfigError(f"expected mode 'RGB' or 'L', got {mode!r}.")
    colour = _colour(background)
    try:
        file, raw = image, _raw_mode(image)
        image = ImageOps.exif_transpose(image)  # a copy, loaded
        frames = _frames(file)
        if min(image.size) == 0:
            raise ImageFault(f"an image of size {image.size}", "remove or replace it")
        seen = _scaled(image, file, raw, tally)
        flat = _flat(seen, colour, tally)
        if tally is not None:
            tally.images += 1
            tally.frames += frames
        return flat if flat.mode == mode else flat.convert(mode)
    except (ImageFault, MemoryError):
        raise
    except Exception as error:
        raise _broken(error) from error


def _colour(background: str | tuple[int, int, int]) -> tuple[int, int, int]:
    try:
        found = ImageColor.getrgb(background) if isinstance(background, str) else tuple(map(int, background))
    except (ValueError, TypeError):
        found = ()
    if len(found) != 3 or not all(0 <= part <= 255 for part in found):
        raise ConfigError(f"expected a background like 'white', '#ffffff' or (255, 255, 255), got {background!r}.")
    return found


def _raw_mode(image: Image.Image) -> str:
    """How the pixels lie in the file, where it was not decoded yet: ``L;4``, ``RGB;16B``, …"""
    tiles = getattr(image, "tile", None)
    if not tiles:
        return ""
    arguments = tiles[0][3]
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def _frames(file: Image.Image) -> bool:
    """Whether a file holds other frames or pages; second pictures of a camera's JPEG (MPO) do not count."""
    try:
        return bool(getattr(file, "is_animated", False)) and file.format != "MPO"
    except Exception:  # only Pillow's GIF looks into the file for this, whose first frame is already there
        return False


def _scaled(image: Image.Image, file: Image.Image, raw: str, tally: ImageTally | None) -> Image.Image:
    """The same image with 8 bits a channel and a colour key, if it has one, of those 8 bits."""
    key = image.info.get("transparency")
    if image.mode == "F":
        raise ImageFault("mode F, floating-point values whose range cannot be known", _SAVE_AGAIN)
    if image.mode.startswith("I"):
        return _from_integers(image, file, key, tally)
    if ";16" in raw:
        if key is not None:
            raise ImageFault("16 bits a channel with a transparent colour", "save it with an alpha channel")
        if tally is not None:
            bands = image.convert("RGB") if image.mode != "CMYK" else image
            found = np.asarray(bands.getextrema())
            tally.add_range(int(found.min()) / 255, int(found.max()) / 255)
    if raw in _PNG_LEVELS and isinstance(key, int):
        image.info["transparency"] = key * _PNG_LEVELS[raw]  # Pillow scales the pixels alone
    return image


def _from_integers(image: Image.Image, file: Image.Image, key: Any, tally: ImageTally | None) -> Image.Image:
    """Modes I;16, I;16B, … and I."""
    values, tags = np.asarray(image).astype(np.int64), getattr(file, "tag_v2", {})
    low, high = int(values.min()), int(values.max())
    if image.mode == "I" and (low < 0 or high > FULL_16 or 0 < high <= 255):
        why = "which 8 or 16 bits could mean" if 0 <= low and high <= 255 else "whose range cannot be known"
        raise ImageFault(f"mode I, integers of 32 bits in {low}..{high}, {why}", _SAVE_AGAIN)
    full = 4095 if tuple(tags.get(258, ())) == (12,) else FULL_16
    if tally is not None:
        tally.add_range(low / full, high / full)
    hidden = values == key
    if tags.get(262) == 0:  # WhiteIsZero, which Pillow minds for 8 bits alone
        values = full - values
    grey = Image.fromarray(from_full_range(values, full))
    if isinstance(key, int):
        return Image.merge("LA", (grey, Image.fromarray(np.where(hidden, 0, 255).astype(np.uint8))))
    return grey


def _flat(image: Image.Image, colour: tuple[int, int, int], tally: ImageTally | None) -> Image.Image:
    """L where the image is grey and opaque, else RGB on the background."""
    if not image.has_transparency_data:
        return image.convert("L") if image.mode in ("1", "L") else image.convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    seen = image.convert("RGBA")
    alpha, plain = seen.getchannel("A"), seen.convert("RGB")
    if alpha.getextrema()[0] == 255:
        return plain
    if tally is not None:
        tally.transparent += 1
    base = Image.new("RGB", image.size, colour)
    base.paste(plain, mask=alpha)
    return base
