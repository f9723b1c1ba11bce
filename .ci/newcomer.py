"""A newcomer's main job with an installed package: ``python newcomer.py FOLDER``; fails if something is amiss.

Where the folder --data holds a trained MobileNetV2 and photos, these are the model and the images. Otherwise
handwritten digits are written out as PNG, and a small ViT with random weights stands for the model. All attacks of the
exam `quick` are made, with fewer seeds and steps than it asks for, so that it takes minutes: this shows that init, plan
and run lead to certificate, report and a publishable folder, and supports no claim. --whole leaves the exam as it is.
"""

from __future__ import annotations

import argparse
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
PHOTOS = "tiny_imagenet/tiny_imagenet_50.zip"
CLASSES, ROWS, PIXELS = 6, 40, 64
"""Of each side, images of each class, and the size at which the backbone sees them."""
EXAM = {"seeds": [0, 1], "adapt": False,
        "settings": [f"{name}.steps=20" for name in ("lora", "full_finetune", "canonical_finetune")]}
"""A short exam: budgets do not follow the base, and no verdict of two seeds is more than INCONCLUSIVE."""


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


def prepare_photos(work: Path, data: Path) -> None:
    """Photos of twelve things, every second kind to be kept out, and a MobileNetV2 that was trained on ImageNet."""
    with zipfile.ZipFile(data / PHOTOS) as archive:
        rows = [(Path(name).parts[2], name) for name in sorted(archive.namelist())
                if "/train/" in name and name.endswith(".JPEG")]
        kinds = sorted({kind for kind, _ in rows})
        chosen, taken = kinds[:: len(kinds) // (2 * CLASSES)][: 2 * CLASSES], Counter[str]()
        for kind, name in rows:
            if kind in chosen and taken[kind] < ROWS:
                folder = work / ("harm" if chosen.index(kind) % 2 else "keep") / kind
                folder.mkdir(parents=True, exist_ok=True)
                (folder / Path(name).name).write_bytes(archive.read(name))
                taken[kind] += 1
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


def shorten(file: Path, real: bool) -> None:
    """Fewer seeds and steps than init wrote."""
    told = yaml.safe_load(file.read_text(encoding="utf-8"))
    told["attack"] |= EXAM
    if not real:
        told["immunize"]["closed_form_adversary"]["max_steps"] = 20
    file.write_text(yaml.safe_dump(told, sort_keys=False), encoding="utf-8")


def main(work: Path, data: Path | None, whole: bool) -> None:
    """Three commands, and a look at what they left."""
    work.mkdir(parents=True)
    print(f"hf_immunize {hf_immunize.__version__} from {Path(hf_immunize.__file__).parent}")
    real = data is not None and all((data / name).exists() for name in (BACKBONE, PHOTOS))
    print("model: MobileNetV2, trained on ImageNet; photos" if real else "model: a ViT of random weights; digits")
    prepare_photos(work, data) if real else prepare_digits(work)
    call(work, "init", "job", "--model", "model", "--primary", "keep", "--harmful", "harm")
    if not whole:
        shorten(work / "job" / "run.yaml", real)
    call(work, "plan", "job/run.yaml")
    call(work, "run", "job/run.yaml")
    call(work, "show", "job/closed_form_adversary")
    call(work, "publish", "job/closed_form_adversary", "someone/model", "--dry-run", "--allow-failed")
    certificate = json.loads((work / "job" / "closed_form_adversary" / "certificate.json").read_text(encoding="utf-8"))
    assert certificate["cells"], "the certificate has no verdict"
    assert (work / "job" / "report.html").stat().st_size > 10_000, "report.html is missing or empty"
    call(work, "run", "job/run.yaml")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, help="Folder of trained weights and photos.")
    parser.add_argument("--whole", action="store_true", help="The exam as init wrote it: hours with real weights.")
    given = parser.parse_args()
    main(given.folder.resolve(), given.data and given.data.resolve(), given.whole)
