"""Printed letters at random places of a 16×16 canvas: a harmless task of the kind of the digits demo's harmful one.

    python benchmarks/scattered_letters.py --output runs/letters

Five letters in the fonts that matplotlib brings, each turned, sheared and scaled by chance, drawn large and averaged
down to 8×8 as scikit-learn's handwritten digits are, and put where those are put. The public model of the demo has seen
none of them. Column ``original`` numbers the drawings: use it as group_column. The draw is fixed. Writes
letters.parquet, the benign task of frontier_digits.yaml.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from hf_immunize.data.builders import CANVAS

LETTERS = "ABCDE"
_GLYPH, _LARGE = 8, 128
"""Edge of a letter on the canvas, and the edge it is drawn at."""
_DRAWINGS, _PLACES = 6, 8
"""Of each letter in each font, and at how many places each is shown."""


def fonts() -> list[Path]:
    """Text fonts that matplotlib brings: DejaVu and STIX General."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    found = [file for pattern in ("DejaVu*.ttf", "STIXGeneral*.ttf") for file in sorted(folder.glob(pattern))]
    return [file for file in found if "Display" not in file.name]


def drawing(letter: str, font: Path, draw: np.random.Generator) -> np.ndarray:
    """One letter, 8×8, 0..255."""
    canvas = PILImage.new("L", (_LARGE, _LARGE))
    face = ImageFont.truetype(str(font), int(draw.uniform(0.75, 1.0) * _LARGE))
    ImageDraw.Draw(canvas).text((_LARGE / 2, _LARGE / 2), letter, fill=255, font=face, anchor="mm")
    turn, shear = np.deg2rad(draw.uniform(-20, 20)), draw.uniform(-0.3, 0.3)
    matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) @ np.array([[1, shear], [0, 1]])
    shift = _LARGE / 2 - matrix @ np.full(2, _LARGE / 2)
    rows = np.hstack([matrix, shift[:, None]]).ravel().tolist()
    turned = canvas.transform((_LARGE, _LARGE), PILImage.Transform.AFFINE, rows, PILImage.Resampling.BILINEAR)
    return np.asarray(turned.resize((_GLYPH, _GLYPH), PILImage.Resampling.BOX), dtype=np.uint8)


def letters() -> Dataset:
    """All drawings at all places."""
    draw = np.random.default_rng(0)
    images, labels, originals = [], [], []
    for font in fonts():
        for label, letter in enumerate(LETTERS):
            for _ in range(_DRAWINGS):
                glyph, original = drawing(letter, font, draw), len(images) // _PLACES
                for _ in range(_PLACES):
                    canvas = np.zeros((CANVAS, CANVAS), dtype=np.uint8)
                    top, left = draw.integers(0, CANVAS - _GLYPH + 1, size=2)
                    canvas[top : top + _GLYPH, left : left + _GLYPH] = glyph
                    images.append(PILImage.fromarray(canvas))
                    labels.append(label)
                    originals.append(original)
    features = Features({"image": Image(), "label": ClassLabel(names=list(LETTERS)), "original": Value("int64")})
    return Dataset.from_dict({"image": images, "label": labels, "original": originals}, features=features)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/letters", help="folder for letters.parquet")
    output = Path(parser.parse_args().output)
    output.mkdir(parents=True, exist_ok=True)
    table = letters()
    table.to_parquet(str(output / "letters.parquet"))
    print(f"{output / 'letters.parquet'}: {len(table)} images of {len(set(table['original']))} drawings")


if __name__ == "__main__":
    main()
