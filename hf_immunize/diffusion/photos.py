"""Folders of image files as pixels.

Images that are not RGB are converted; the shorter side is resized, the middle cropped. Nothing is augmented.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from hf_immunize.errors import DataError

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def read_pixels(folder: str | Path, resolution: int) -> Tensor:
    """Every image of a folder as N×3×R×R in −1..1, by name. Raises DataError for none, or one that cannot be read."""
    names = sorted(path for path in Path(folder).glob("*") if path.suffix.lower() in _SUFFIXES)
    if not names:
        raise DataError(f"expected images ({', '.join(_SUFFIXES)}) in {Path(folder).name!r}, got none: check the path.")
    rows = []
    for path in names:
        try:
            with Image.open(path) as opened:
                image = ImageOps.fit(ImageOps.exif_transpose(opened).convert("RGB"), (resolution, resolution))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"expected a readable image, got {path.name!r}: {error}: remove or replace it.") from error
        rows.append(torch.from_numpy(np.asarray(image).astype(np.float32) / 127.5 - 1).permute(2, 0, 1))
    return torch.stack(rows)
