"""Immunize a text-to-image pipeline against learning a concept from a folder of images.

    accelerate launch recipes/immunize_text_diffusion.py --config recipes/stable-diffusion-1-5/task.yaml \
        --config recipes/stable-diffusion-1-5/simulated_attack.yaml \
        --retain_images photos/retain --harmful_images photos/concept
"""

from __future__ import annotations

import sys

from accelerate import PartialState
from immunize_diffusion import BaseArguments, dry_run, immunize

from hf_immunize.diffusion import load_pipeline
from hf_immunize.diffusion.prompts import PromptArguments, PromptTask
from hf_immunize.errors import ImmunizeError
from hf_immunize.hub import is_hub_id, local_folder, working_folder
from hf_immunize.options import parse_options
from hf_immunize.training.diffusion import DiffusionImmunizationConfig


def fetch(path: str) -> str:
    """A local folder as it is; a Hub id as the folder it is downloaded to."""
    return str(local_folder(path, into=working_folder(path))[0]) if is_hub_id(path) else path


def main() -> None:
    given, base, args = parse_options(
        (PromptArguments, BaseArguments, DiffusionImmunizationConfig), description=__doc__.splitlines()[0]
    )
    with PartialState(cpu=args.use_cpu).local_main_process_first():
        folder = fetch(base.base_path)
    if base.dry_run:
        print(dry_run(folder, base, args))
        return
    pipeline = load_pipeline(folder, denoiser_dtype=base.dtype)
    task = PromptTask(given, pipeline)
    names = ("retain train", "retain validation", "harmful defense")
    splits = {name: task.examples(*name.split()) for name in names}
    immunize(pipeline, splits, task.source, task.described(), folder, args)


if __name__ == "__main__":
    try:
        main()
    except ImmunizeError as error:
        sys.exit(f"{type(error).__name__}: {error}")
