"""A newcomer's main job with an installed package: ``python newcomer.py FOLDER``; fails if something is amiss.

Handwritten digits are written out as PNG files in one folder per class, a small ViT with random weights stands for the
model: this shows that init, plan and run lead to certificate, report and a publishable folder; it supports no claim.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

import hf_immunize


def prepare(work: Path) -> None:
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


def call(work: Path, *words: str) -> None:
    """One command of the installed package."""
    print("$ hf-immunize", *words, flush=True)
    start = time.perf_counter()
    subprocess.run([str(Path(sys.executable).with_name("hf-immunize")), *words], cwd=work, check=True)
    print(f"({time.perf_counter() - start:.0f} s)", flush=True)


def main(work: Path) -> None:
    """Three commands, and a look at what they left."""
    work.mkdir(parents=True)
    print(f"hf_immunize {hf_immunize.__version__} from {Path(hf_immunize.__file__).parent}")
    prepare(work)
    call(work, "init", "job", "--model", "model", "--primary", "keep", "--harmful", "harm")
    file = work / "job" / "run.yaml"
    told = yaml.safe_load(file.read_text(encoding="utf-8"))
    told["immunize"]["closed_form_adversary"]["max_steps"] = 20
    told["attack"] |= {"seeds": [0, 1], "settings": ["lora.steps=5", "full_finetune.steps=5"]}
    file.write_text(yaml.safe_dump(told, sort_keys=False), encoding="utf-8")
    call(work, "plan", "job/run.yaml")
    call(work, "run", "job/run.yaml")
    call(work, "show", "job/closed_form_adversary")
    call(work, "publish", "job/closed_form_adversary", "someone/model", "--dry-run", "--allow-failed")
    assert (work / "job" / "report.html").stat().st_size > 10_000, "report.html is missing or empty"
    call(work, "run", "job/run.yaml")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
