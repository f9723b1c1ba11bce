"""Two ways around the defence, on the models that vision_transfer.py left: blurred images, and features before the cut.

    python benchmarks/vision_checks.py --backbone mobilenetv2 [--model_path ... as for vision_transfer.py]

The primary images are 64 pixels wide and the cars 128, so that a model could tell the tasks apart by sharpness alone:
here the attacker's images are first brought down to 64 pixels. And the frozen trunk still holds what the tail hides: a
ridge attacker on the pooled activations at the cut. Writes <output>/<backbone>/checks.json.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import load_model
from torch import Tensor
from vision_attackers import ROLES, attack_all, context_of, ridge, signed_rfd, strongest
from vision_rows import OURS
from vision_tail import BACKBONES, features_of, load_split, load_tail, prepare

from hf_immunize.records import atomic_write


def at_the_cut(folder: Path) -> dict[str, float]:
    """Test accuracy of the ridge attacker on the frozen trunk's activations, averaged over positions."""
    splits = {role: load_split(folder, f"harmful_{role}") for role in ROLES}
    found: dict[str, Tensor] = {role: rows.pixel_values.float() for role, rows in splits.items()}
    tokens = next(iter(found.values())).shape[1] == 1
    pooled = {role: x.squeeze(1).mean(dim=1) if tokens else x.mean(dim=(2, 3)) for role, x in found.items()}
    labels = {role: rows.labels for role, rows in splits.items()}
    return {"test": ridge(context_of(pooled, labels), 0).test}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=sorted(BACKBONES), required=True)
    parser.add_argument("--model_path")
    parser.add_argument("--primary_dataset", default="runs/vision-data/tiny_imagenet.parquet")
    parser.add_argument("--harmful_dataset", default="runs/vision-data/stanford_cars.parquet")
    parser.add_argument("--output", default="runs/vision")
    parser.add_argument("--rows", nargs="*", default=["init", OURS])
    given = parser.parse_args()
    folder = Path(given.output) / given.backbone
    prepare(given.backbone, folder, given.model_path, given.primary_dataset, given.harmful_dataset)
    coarse = {role: load_split(folder, f"harmful_{role}_coarse") for role in ROLES}
    labels = {role: rows.labels for role, rows in coarse.items()}
    found: dict[str, dict] = {"cut": at_the_cut(folder), "coarse": {}}
    control = None
    for row in given.rows:
        tail = load_tail(given.backbone, given.model_path)
        load_model(tail, folder / f"{row.replace(' ', '_').replace('=', '')}-seed0.safetensors")
        made = attack_all({role: features_of(tail, rows) for role, rows in coarse.items()}, labels)
        control = control or strongest(made)
        best = strongest(made)
        found["coarse"][row] = {name: asdict(one) for name, one in made.items()}
        print(f"{row}: cars at 64 pixels, best attacker {100 * best.test:.1f} %, RFD {signed_rfd(best, control):.0f} %")
    print(f"ridge attacker on pooled activations at the cut: {100 * found['cut']['test']:.1f} %")
    atomic_write(folder / "checks.json", json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
