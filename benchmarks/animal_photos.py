"""Photos of Tiny-ImageNet at 32 pixels, for a public model that is trained here and the tasks that come after it.

    python benchmarks/vision_data.py --tiny_imagenet <zip>
    python benchmarks/animal_photos.py --output runs/animals

Two splits in one folder. ``public``: 40 photos of each of the first 190 classes, each as it is, mirrored, and in six
crops of 3/4 to all of it at chance places, half of them mirrored; the public model learns from these alone, and they
are not judged on. ``train``: the other 60 photos of each of these classes, and all 100 of the others, as they are;
tasks split it by content. The choice is fixed.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from PIL import ImageOps
from pyarrow import parquet

CLASSES, PUBLIC, SIZE, CROPS = 190, 40, 32, 6
"""Classes that the public model knows, photos of each that it sees, edges in pixels, and crops of each."""
README = """---
configs:
- config_name: default
  data_files:
  - {split: public, path: public.parquet}
  - {split: train, path: train.parquet}
---
"""
"""Says which file is which split, as a data set on the Hub does."""


def variants(photo: PILImage.Image, draw: np.random.Generator) -> list[PILImage.Image]:
    """As it is, mirrored, and crops, all of one size."""
    small = photo.resize((SIZE, SIZE), PILImage.Resampling.BOX)
    found = [small, ImageOps.mirror(small)]
    for place in range(CROPS):
        edge = int(draw.integers(photo.width * 3 // 4, photo.width + 1))
        left, top = draw.integers(0, photo.width - edge + 1, size=2).tolist()
        box = (left, top, left + edge, top + edge)
        crop = photo.crop(box).resize((SIZE, SIZE), PILImage.Resampling.BILINEAR)
        found.append(ImageOps.mirror(crop) if place % 2 else crop)
    return found


def splits(source: Path) -> dict[str, Dataset]:
    """Both splits of the photos in a parquet file of benchmarks/vision_data.py."""
    draw = np.random.default_rng(0)
    schema = Features.from_arrow_schema(parquet.read_schema(source))
    table = parquet.read_table(source).to_pydict()
    features = Features({"image": Image(), "label": ClassLabel(names=schema["label"].names)})
    rows: dict[str, list[tuple[PILImage.Image, int]]] = {"public": [], "train": []}
    labels = np.asarray(table["label"])
    for label in range(len(schema["label"].names)):
        for place, row in enumerate(draw.permutation(np.flatnonzero(labels == label))):
            photo = PILImage.open(io.BytesIO(table["image"][row]["bytes"])).convert("RGB")
            if label < CLASSES and place < PUBLIC:
                rows["public"] += [(shown, label) for shown in variants(photo, draw)]
            else:
                rows["train"].append((photo.resize((SIZE, SIZE), PILImage.Resampling.BOX), label))
    return {
        name: Dataset.from_dict(dict(zip(("image", "label"), zip(*found, strict=True), strict=True)), features=features)
        for name, found in rows.items()
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="runs/vision-data/tiny_imagenet.parquet", help="made by vision_data.py")
    parser.add_argument("--output", default="runs/animals", help="folder for public.parquet and train.parquet")
    given = parser.parse_args()
    output = Path(given.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "README.md").write_text(README, encoding="utf-8")
    for name, table in splits(Path(given.source)).items():
        table.to_parquet(str(output / f"{name}.parquet"))
        print(f"{output / f'{name}.parquet'}: {len(table)} photos")


if __name__ == "__main__":
    main()
