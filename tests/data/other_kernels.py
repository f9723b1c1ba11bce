"""What must come out the same on every processor, as digests: ``python tests/data/other_kernels.py images``."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import ViTImageProcessorPil

from hf_immunize.data import fingerprint, preprocess, split_by_content
from hf_immunize.data.fingerprint import digest_pixels
from hf_immunize.data.streams import StepBatchSampler
from hf_immunize.diffusion.photos import read_pixels


def draw_images(folder: Path) -> None:
    for place in range(12):
        pixels = np.random.default_rng(place).integers(0, 256, (37 + place, 53, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((97, 61)).save(folder / f"{place}.{'jpg' if place % 2 else 'png'}")


def digests(folder: Path) -> dict[str, str]:
    """Pixels of both kinds of model, splits, and seeded draws of rows, masks and uniform numbers."""
    names = [path.name for path in sorted(folder.glob("*.*g"))]
    held = datasets.Dataset.from_dict(
        {"image": [str(folder / name) for name in names], "label": [place % 2 for place in range(len(names))]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    )
    found = {}
    for resample in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS):
        processor = ViTImageProcessorPil(
            size={"height": 32, "width": 40}, resample=resample, image_mean=[0.485, 0.456, 0.406],
            image_std=[0.229, 0.224, 0.225],
        )
        rows = preprocess(held, processor, label_names=["a", "b"], name="rows")
        found[f"rows, {resample.name}"] = fingerprint(rows, source="", role="").sha256
    splits = split_by_content(held, {"attack": 0.5, "test": 0.5}, seed=3)
    found["splits"] = str({name: part["label"][:] for name, part in splits.items()})
    found["photos"] = hashlib.sha256(digest_pixels(read_pixels(folder, 32).numpy())).hexdigest()
    found["rows of a step"] = str(StepBatchSampler([0, 1] * 20, 8, seed=7).global_batch(5).tolist())
    generator = torch.Generator().manual_seed(0)
    found["permutation"] = str(torch.randperm(200, generator=generator).tolist())
    found["uniform"] = hashlib.sha256(digest_pixels(torch.rand(999, generator=generator).numpy())).hexdigest()
    torch.manual_seed(0)
    kept = torch.nn.functional.dropout(torch.ones(999), 0.25)
    found["dropout"] = hashlib.sha256(digest_pixels(kept.numpy())).hexdigest()
    return found


if __name__ == "__main__":
    print(json.dumps({"kernels": torch.backends.cpu.get_cpu_capability(), **digests(Path(sys.argv[1]))}))
