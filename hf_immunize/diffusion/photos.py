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


def image_files(folder: str | Path) -> list[Path]:
    """Image files of a folder, by name. Raises DataError for none."""
    names = sorted(path for path in Path(folder).glob("*") if path.suffix.lower() in _SUFFIXES)
    if not names:
        raise DataError(f"expected images ({', '.join(_SUFFIXES)}) in {Path(folder).name!r}, got none: check the path.")
    return names


def read_captions(folder: str | Path) -> list[str] | None:
    """The ``text`` that ``metadata.jsonl`` gives each image of a folder; None where there is no such file.

    Raises:
        DataError: a line that is not JSON with ``file_name`` and ``text``, or an image without a caption.
    """
    path = Path(folder) / CAPTIONS
    if not path.is_file():
        return None
    told: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            told[str(row["file_name"])] = str(row["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"expected lines like {{\"file_name\": \"a.png\", \"text\": \"a photo\"}} in {Path(folder).name}/"
                f"{CAPTIONS}, got {line[:60]!r} in line {number}: {type(error).__name__} {error}."
            ) from error
    missing = [file.name for file in image_files(folder) if not told.get(file.name, "").strip()]
    if missing:
        raise DataError(
            f"expected a caption of every image in {Path(folder).name}/{CAPTIONS}, got none for {missing[:5]}: add one."
        )
    return [told[file.name] for file in image_files(folder)]


def read_pixels(folder: str | Path, resolution: int) -> Tensor:
    """Every image of a folder as N×3×R×R in −1..1, by name. Raises DataError for none, or one that cannot be read."""
    rows = []
    for path in image_files(folder):
        try:
            with Image.open(path) as opened:
                image = ImageOps.fit(ImageOps.exif_transpose(opened).convert("RGB"), (resolution, resolution))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"expected a readable image, got {path.name!r}: {error}: remove or replace it.") from error
        rows.append(torch.from_numpy(np.asarray(image).astype(np.float32) / 127.5 - 1).permute(2, 0, 1))
    return torch.stack(rows)
