"""Image files of every kind, each with the RGB pixels it shows, worked out from the numbers it was made of."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, PngImagePlugin

WHITE = (255, 255, 255)
ORIENTED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: a.swapaxes(0, 1)[::-1],
}
"""What a viewer does for each EXIF orientation (TIFF 6.0, tag 274)."""


def composite(rgb: np.ndarray, alpha: np.ndarray, background=WHITE) -> np.ndarray:
    """Straight alpha on a background, rounded; no tie exists, 255 is odd."""
    a = alpha[..., None] / 255
    return np.rint(rgb * a + np.array(background) * (1 - a)).astype(np.uint8)


def grey_of(rgb: np.ndarray) -> np.ndarray:
    """ITU-R 601 luma with the weights to 16 bits, as Pillow's documentation gives them."""
    wide = rgb.astype(np.int64)
    return ((wide @ np.array([19595, 38470, 7471]) + 0x8000) >> 16).astype(np.uint8)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(np.asarray(values)[..., None], 3, axis=-1).astype(np.uint8)


@dataclass
class Made:
    """A PIL image, how it has to be saved, and the truth before its orientation."""

    image: Image.Image
    truth: np.ndarray
    format: str = "PNG"
    options: dict | None = None

    def file(self, orientation: int = 1) -> bytes:
        buffer = io.BytesIO()
        options = dict(self.options or {})
        if orientation != 1:
            exif = Image.Exif()
            exif[274] = orientation
            options["exif"] = exif
        self.image.save(buffer, self.format, **options)
        return buffer.getvalue()


def sixteen(values: np.ndarray) -> np.ndarray:
    return np.rint(values / 257).astype(np.uint8)


def png_16(values: np.ndarray, colour: int) -> bytes:
    """A PNG of 16 bits a channel, which Pillow cannot write: H×W×C big-endian values, filter 0."""
    height, width = values.shape[:2]
    buffer = io.BytesIO()
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    buffer.write(b"\x89PNG\r\n\x1a\n")
    PngImagePlugin.putchunk(buffer, b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0))
    PngImagePlugin.putchunk(buffer, b"IDAT", zlib.compress(lines))
    PngImagePlugin.putchunk(buffer, b"IEND", b"")
    return buffer.getvalue()


def kinds(rng: np.random.Generator, height: int, width: int) -> dict[str, Made]:
    """One image of every kind whose truth is exact; the pixels are random."""
    shape = (height, width)
    level = rng.integers(0, 256, shape).astype(np.uint8)
    colour = rng.integers(0, 256, (*shape, 3)).astype(np.uint8)
    alpha = rng.choice(np.array([0, 1, 100, 254, 255]), shape).astype(np.uint8)
    deep = rng.integers(0, 65536, shape).astype(np.uint16)
    deep.flat[0] = 65535
    bits = rng.integers(0, 2, shape).astype(bool)
    palette = rng.integers(0, 256, (4, 3)).astype(np.uint8)
    index = rng.integers(0, 4, shape).astype(np.uint8)
    indexed = Image.fromarray(index, "P")
    indexed.putpalette(palette.tobytes())
    shown = palette[index]
    table = np.array([0, 128, 255, 7], np.uint8)
    key, deep_key, colour_key = int(level.flat[-1]), int(deep.flat[-1]), tuple(map(int, colour[0, 0]))
    opaque = np.where(level == key, 0, 255)
    premultiplied = Image.fromarray(np.dstack([colour, alpha]), "RGBA")
    half = rng.integers(0, 16, shape).astype(np.uint8)
    return {
        "L": Made(Image.fromarray(level), grey(level)),
        "RGB": Made(Image.fromarray(colour), colour),
        "1": Made(Image.fromarray(bits), grey(bits * 255)),
        "L of 4 bits": Made(Image.fromarray(half * 17), grey(half * 17), options={"bits": 4}),
        "I;16": Made(Image.fromarray(deep), grey(sixteen(deep))),
        "I;16 TIFF": Made(Image.fromarray(deep), grey(sixteen(deep)), "TIFF"),
        "I;16B TIFF": Made(Image.frombytes("I;16B", (width, height), deep.astype(">u2").tobytes()),
                           grey(sixteen(deep)), "TIFF"),
        "I": Made(Image.fromarray(deep.astype(np.int32)), grey(sixteen(deep)), "TIFF"),
        "P": Made(indexed, shown),
        "P, alpha by entry": Made(indexed, composite(shown, table[index]), options={"transparency": table.tobytes()}),
        "P, one clear entry": Made(indexed, composite(shown, np.where(index == 2, 0, 255)),
                                   options={"transparency": 2}),
        "P GIF": Made(indexed, composite(shown, np.where(index == 1, 0, 255)), "GIF",
                      {"transparency": 1, "optimize": False}),
        "LA": Made(Image.fromarray(np.dstack([level, alpha])), composite(grey(level), alpha)),
        "RGBA": Made(Image.fromarray(np.dstack([colour, alpha])), composite(colour, alpha)),
        "RGBA WebP": Made(premultiplied, composite(colour, alpha), "WEBP", {"lossless": True, "exact": True}),
        "L, clear level": Made(Image.fromarray(level), composite(grey(level), opaque), options={"transparency": key}),
        "RGB, clear colour": Made(
            Image.fromarray(colour),
            composite(colour, np.where((colour == np.array(colour_key)).all(-1), 0, 255)),
            options={"transparency": colour_key},
        ),
        "I;16, clear level": Made(
            Image.fromarray(deep), composite(grey(sixteen(deep)), np.where(deep == deep_key, 0, 255)),
            options={"transparency": deep_key},
        ),
        "1, clear white": Made(
            Image.fromarray(bits), composite(grey(bits * 255), np.where(bits, 0, 255)), options={"transparency": 1},
        ),
    }


NO_ORIENTATION = {"P GIF"}
