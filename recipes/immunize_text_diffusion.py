"""Immunize a text-to-image pipeline against learning a concept from a folder of images.

    accelerate launch recipes/immunize_text_diffusion.py --config recipes/stable-diffusion-1-5/simulated_attack.yaml \
        --retain_images photos/retain --harmful_images photos/concept
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import torch
from immunize_diffusion import BaseArguments, immunize

from hf_immunize.diffusion import LatentDataset, load_pipeline
from hf_immunize.diffusion.encoding import PromptArguments, encode, read_pixels
from hf_immunize.errors import DataError, ImmunizeError
from hf_immunize.hub import is_hub_id, local_folder, working_folder
from hf_immunize.options import parse_options
from hf_immunize.training.diffusion import DiffusionImmunizationConfig

NAMES = ["retain", "harmful"]


def split(retain: LatentDataset) -> tuple[LatentDataset, LatentDataset]:
    """Every fifth retained image is held out for the guard."""
    rows = torch.arange(len(retain))
    if len(rows) < 5:
        raise DataError(f"expected at least 5 retained images, one of which is held out, got {len(rows)}: add some.")
    return retain.subset(rows[rows % 5 != 4]), retain.subset(rows[rows % 5 == 4])


def main() -> None:
    task, base, args = parse_options(
        (PromptArguments, BaseArguments, DiffusionImmunizationConfig), description=__doc__.splitlines()[0]
    )
    folder = base.base_path
    if is_hub_id(folder):
        folder = str(local_folder(folder, into=working_folder(folder))[0])
    pipeline = load_pipeline(folder)
    retain, harmful = (
        encode(pipeline, read_pixels(getattr(task, f"{name}_images"), task.resolution), getattr(task, f"{name}_prompt"),
               label, NAMES)
        for label, name in enumerate(NAMES)
    )
    train, held = split(retain)
    splits = {"retain train": train, "retain validation": held, "harmful defense": harmful}
    named = {name: Path(getattr(task, name)).name for name in ("retain_images", "harmful_images")}
    immunize(pipeline, splits, "folders of images", asdict(task) | named, folder, args)


if __name__ == "__main__":
    try:
        main()
    except ImmunizeError as error:
        sys.exit(f"{type(error).__name__}: {error}")
