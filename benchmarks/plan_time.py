"""CPU seconds of ``hf-immunize init`` and ``plan`` on many small images, which are written first and then removed.

    python benchmarks/plan_time.py --images 50000
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil


def write_images(folder: Path, count: int, classes: int, seed: int) -> None:
    """Class folders of different 32x32 photos of noise, PNG."""
    draws = np.random.default_rng(seed)
    for number in range(count):
        place = folder / f"class {number % classes}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draws.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(place / f"{number}.png",
                                                                                    compress_level=1)


def write_model(folder: Path, classes: int) -> None:
    """A small ViT with an output for each class, random weights."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        id2label={place: f"class {place}" for place in range(classes)},
        label2id={f"class {place}": place for place in range(classes)},
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)


def spent(words: list[str]) -> tuple[float, float, str]:
    """CPU seconds and seconds of one command, children included, and what it printed."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "hf_immunize.cli", *words], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if done.returncode not in (0, 1):
        sys.exit(done.stdout + done.stderr)
    return cpu, time.perf_counter() - start, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=50_000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_images(root / "keep", given.images // 2, 10, seed=0)
        write_images(root / "harm", given.images - given.images // 2, 5, seed=1)
        write_model(root / "model", 10)
        words = ["--model", str(root / "model"), "--primary", str(root / "keep"), "--harmful", str(root / "harm")]
        for verb, more in (("init", [str(root / "job"), *words]), ("plan", [str(root / "job" / "run.yaml"), "--json"])):
            cpu, wall, told = spent([verb, *more])
            print(f"{verb}: {cpu:.1f} s of CPU, {wall:.1f} s, {given.images} images")
        for finding in json.loads(told):
            print(f"  {finding['part']}: {finding['level']}: {finding['told']}")


if __name__ == "__main__":
    main()
