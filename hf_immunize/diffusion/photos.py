"""Folders of image files as pixels, with captions where ``metadata.jsonl`` has them, as in ``datasets``' imagefolder.

Images that are not RGB are converted; the shorter side is resized, the middle cropped. Nothing is augmented.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from hf_immunize.errors import DataError

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CAPTIONS = "metadata.jsonl"
_EXAMPLE = '{"file_name": "a.png", "text": "a photo"}'


def _images_in(folder: str | Path) -> list[Path]:
    return sorted(path for path in Path(folder).glob("*") if path.suffix.lower() in _SUFFIXES)


def has_images(folder: str | Path) -> bool:
    """Whether image files lie directly in a folder."""
    return bool(_images_in(folder))


def image_files(folder: str | Path) -> list[Path]:
    """Image files of a folder, by name. Raises DataError for none."""
    names = _images_in(folder)
    if not names:
        raise DataError(f"expected images ({', '.join(_SUFFIXES)}) in {Path(folder).name!r}, got none: check the path.")
    return names


def read_captions(folder: str | Path) -> list[str] | None:
    """The ``text`` that ``metadata.jsonl`` gives each image of a folder; None where there is no such file.

    It lies in the folder, or above it with ``folder/name`` as file names.

    Raises:
        DataError: a line that is not JSON with ``file_name`` and ``text``, an image without a caption, or captions in
            another kind of file.
    """
    folder, start = Path(folder), ""
    path = folder / CAPTIONS
    if not path.is_file() and (folder.parent / CAPTIONS).is_file() and not has_images(folder.parent):
        path, start = folder.parent / CAPTIONS, f"{folder.name}/"
    if not path.is_file():
        for other in (folder / "metadata.csv", folder / "metadata.parquet"):
            if other.is_file():
                raise DataError(f"expected captions in {CAPTIONS}, got {other.name} in {folder.name}: convert it.")
        return None
    told = _captions_of(path)
    files = image_files(folder)
    missing = [file.name for file in files if not told.get(start + file.name, "").strip()]
    if missing:
        raise DataError(
            f"expected a caption of every image in {folder.name}/{CAPTIONS}, got none for {missing[:5]}: add one."
        )
    return [told[start + file.name] for file in files]


def _captions_of(path: Path) -> dict[str, str]:
    told: dict[str, str] = {}
    where = f"{path.parent.name}/{path.name}"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines would split inside captions as well
    except (OSError, ValueError) as error:
        raise DataError(f"expected {where} in UTF-8, got {error}.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, text = row["file_name"], row["text"]
            if not isinstance(name, str) or not isinstance(text, str):
                raise TypeError("file_name and text must be strings")
            told[name] = text
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"expected lines like {_EXAMPLE} in {where}, got {line[:60]!r} in line {number}: "
                f"{type(error).__name__} {error}."
            ) from error
    return told


def read_pixels(folder: str | Path, resolution: int) -> Tensor:
    """Every image of a folder as N×3×R×R in −1..1, by name. Raises DataError for none, or one that cannot be read."""
    rows = []
    for path in image_files(folder):
        try:
            with Image.open(path) as opened:
                if opened.mode.startswith(("I", "F")):
                    raise ValueError(f"mode {opened.mode}: convert it to 8 bits a channel")
                image = ImageOps.fit(ImageOps.exif_transpose(opened).convert("RGB"), (resolution, resolution))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"expected a readable image, got {path.name!r}: {error}: remove or replace it.") from error
        rows.append(torch.from_numpy(np.asarray(image).astype(np.float32) / 127.5 - 1).permute(2, 0, 1))
    return torch.stack(rows)
