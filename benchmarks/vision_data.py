"""Turn the archives of Tiny-ImageNet-200 and Stanford Cars into two parquet files, which the recipes read.

    python benchmarks/vision_data.py --tiny_imagenet tiny_imagenet_50.zip --stanford_cars stanford_cars_80_128.zip \
        --output runs/vision-data

Tiny-ImageNet: the archive of the original layout (train/<wnid>/images/*.JPEG, val/images with val_annotations.txt);
train and validation images become one table, which the recipes split by content hash. Stanford Cars: an archive with
labels.csv (file, label, class_name) and the photos beside it. Images are copied as they are, not encoded again.
"""

from __future__ import annotations

import argparse
import csv
import io
import zipfile
from pathlib import Path, PurePosixPath

import numpy
from datasets import ClassLabel, Dataset, Features, Image

FASHION = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
]  # fmt: skip


def tiny_imagenet(archive: str) -> Dataset:
    """All labelled images of the archive, train before validation, with the 200 WordNet ids as class names."""
    with zipfile.ZipFile(archive) as source:
        names = [name for name in source.namelist() if name.endswith(".JPEG")]
        annotations = next(name for name in source.namelist() if name.endswith("val_annotations.txt"))
        held = dict(line.split("\t")[:2] for line in source.read(annotations).decode().splitlines())
        rows = [
            (name, held[PurePosixPath(name).name] if "/val/" in name else PurePosixPath(name).parts[-3])
            for name in names
            if "/test/" not in name
        ]
        return _table(source, rows)


def stanford_cars(archive: str) -> Dataset:
    """All photos named in labels.csv, in its order, with the class names in the order of their numbers."""
    with zipfile.ZipFile(archive) as source:
        table = next(name for name in source.namelist() if name.endswith("labels.csv"))
        rows = list(csv.DictReader(io.StringIO(source.read(table).decode())))
        paths = {PurePosixPath(name).name: name for name in source.namelist()}
        order = dict(sorted((int(row["label"]), row["class_name"]) for row in rows))
        return _table(source, [(paths[row["file"]], row["class_name"]) for row in rows], list(order.values()))


def fashion_mnist(archive: str) -> Dataset:
    """All images of an .npz file with the arrays ``images`` (N×28×28) and ``labels``."""
    with numpy.load(archive, allow_pickle=False) as arrays:
        labels = arrays["labels"].astype(int).tolist()
        features = Features({"image": Image(), "label": ClassLabel(names=FASHION)})
        return Dataset.from_dict({"image": list(arrays["images"]), "label": labels}, features=features)


def _table(source: zipfile.ZipFile, rows: list[tuple[str, str]], names: list[str] | None = None) -> Dataset:
    names = names or sorted({label for _, label in rows})
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    images = [{"bytes": source.read(path), "path": None} for path, _ in rows]
    return Dataset.from_dict({"image": images, "label": [names.index(label) for _, label in rows]}, features=features)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny_imagenet", help="zip archive of Tiny-ImageNet-200")
    parser.add_argument("--stanford_cars", help="zip archive of Stanford Cars with labels.csv")
    parser.add_argument("--fashion_mnist", help=".npz file of Fashion-MNIST, the benign third task of exam.yaml")
    parser.add_argument("--output", default="runs/vision-data", help="folder for the parquet files")
    given = parser.parse_args()
    output = Path(given.output)
    output.mkdir(parents=True, exist_ok=True)
    for name, read in (
        ("tiny_imagenet", tiny_imagenet),
        ("stanford_cars", stanford_cars),
        ("fashion_mnist", fashion_mnist),
    ):
        if getattr(given, name) is None:
            continue
        table = read(getattr(given, name))
        table.to_parquet(str(output / f"{name}.parquet"))
        print(f"{output / name}.parquet: {len(table)} images, {table.features['label'].num_classes} classes")


if __name__ == "__main__":
    main()
