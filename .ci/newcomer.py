"""A newcomer's main job with an installed package: ``python newcomer.py FOLDER [DATA]``; fails if something is amiss.

Where the folder DATA holds a trained MobileNetV2 and photos, these are the model and the images, and the exam is the
one that init writes. Without them handwritten digits are written out as PNG files, and a small ViT with random weights
stands for the model: this shows that init, plan and run lead to certificate, report and a publishable folder; it
supports no claim.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from sklearn.datasets import load_digits
from transformers import MobileNetV2ImageProcessorPil, ViTConfig, ViTForImageClassification, ViTImageProcessorPil

import hf_immunize

BACKBONE = "models/mobilenet_v2_imagenet"
THINGS, CARS = "tiny_imagenet/tiny_imagenet_50.zip", "stanford_cars/stanford_cars_80_128.zip"
CLASSES, ROWS, PIXELS = 6, 40, 64
"""Of each side, images of each class, and the size at which the backbone sees them."""


def prepare_digits(work: Path) -> None:
    """Images of ten classes in two folders, and a model with its processor."""
    held = load_digits()
    for number, (pixels, label) in enumerate(zip(held.images, held.target, strict=True)):
        folder = work / ("harm" if label >= 5 else "keep") / f"digit {label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.round(pixels * 255 / 16).astype(np.uint8)).save(folder / f"{number}.png")
    config = ViTConfig(image_size=8, patch_size=2, hidden_size=48, num_hidden_layers=3, num_attention_heads=4,
                       intermediate_size=96)  # fmt: skip
    ViTForImageClassification(config).save_pretrained(work / "model")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(work / "model")


def named_photos(archive: zipfile.ZipFile) -> list[tuple[str, str]]:
    """(class, member) of an archive: from its table labels.csv, or by the folders of its training images."""
    if "labels.csv" in archive.namelist():
        with io.TextIOWrapper(archive.open("labels.csv"), encoding="utf-8") as table:
            members = {Path(name).name: name for name in archive.namelist()}
            return [(row["class_name"].replace("/", "-"), members[row["file"]]) for row in csv.DictReader(table)]
    return [(Path(name).parts[2], name) for name in archive.namelist() if "/train/" in name and name.endswith(".JPEG")]


def unpack(path: Path, folder: Path) -> None:
    """The first photos of the first classes of an archive, a folder for each class."""
    with zipfile.ZipFile(path) as archive:
        rows = sorted(named_photos(archive))
        wanted, taken = sorted({label for label, _ in rows})[:CLASSES], Counter[str]()
        for label, member in rows:
            if label in wanted and taken[label] < ROWS:
                (folder / label).mkdir(parents=True, exist_ok=True)
                (folder / label / Path(member).name).write_bytes(archive.read(member))
                taken[label] += 1


def prepare_photos(work: Path, data: Path) -> None:
    """Photos of things to keep and of cars to keep out, and a MobileNetV2 that was trained on ImageNet."""
    unpack(data / THINGS, work / "keep")
    unpack(data / CARS, work / "harm")
    shutil.copytree(data / BACKBONE, work / "model", copy_function=shutil.copyfile)
    MobileNetV2ImageProcessorPil(
        size={"shortest_edge": PIXELS}, crop_size={"height": PIXELS, "width": PIXELS},
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(work / "model")  # fmt: skip


def call(work: Path, *words: str) -> None:
    """One command of the installed package."""
    print("$ hf-immunize", *words, flush=True)
    start = time.perf_counter()
    subprocess.run([str(Path(sys.executable).with_name("hf-immunize")), *words], cwd=work, check=True)
    print(f"({time.perf_counter() - start:.0f} s)", flush=True)


def shorten(file: Path) -> None:
    """A few steps and seeds: random weights need no more."""
    told = yaml.safe_load(file.read_text(encoding="utf-8"))
    told["immunize"]["closed_form_adversary"]["max_steps"] = 20
    told["attack"] |= {"seeds": [0, 1], "settings": ["lora.steps=5", "full_finetune.steps=5"]}
    file.write_text(yaml.safe_dump(told, sort_keys=False), encoding="utf-8")


def main(work: Path, data: Path | None) -> None:
    """Three commands, and a look at what they left."""
    work.mkdir(parents=True)
    print(f"hf_immunize {hf_immunize.__version__} from {Path(hf_immunize.__file__).parent}")
    real = data is not None and all((data / name).exists() for name in (BACKBONE, THINGS, CARS))
    print("model: MobileNetV2, trained on ImageNet; photos" if real else "model: a ViT of random weights; digits")
    prepare_photos(work, data) if real else prepare_digits(work)
    call(work, "init", "job", "--model", "model", "--primary", "keep", "--harmful", "harm")
    if not real:
        shorten(work / "job" / "run.yaml")
    call(work, "plan", "job/run.yaml")
    call(work, "run", "job/run.yaml")
    call(work, "show", "job/closed_form_adversary")
    call(work, "publish", "job/closed_form_adversary", "someone/model", "--dry-run", "--allow-failed")
    certificate = json.loads((work / "job" / "closed_form_adversary" / "certificate.json").read_text(encoding="utf-8"))
    assert certificate["cells"], "the certificate has no verdict"
    assert (work / "job" / "report.html").stat().st_size > 10_000, "report.html is missing or empty"
    call(work, "run", "job/run.yaml")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve() if len(sys.argv) > 2 else None)
