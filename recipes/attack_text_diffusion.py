"""Fine-tune one text-to-image pipeline on folders of images, as an attacker would, and leave one trace file per run.

    accelerate launch recipes/attack_text_diffusion.py --config recipes/stable-diffusion-1-5/task.yaml \
        --config recipes/stable-diffusion-1-5/attack.yaml --model_path runs/stable-diffusion-1-5/simulated_attack \
        --retain_images photos/retain --harmful_images photos/concept
"""

from __future__ import annotations

import sys
from dataclasses import replace

from attack_diffusion import AttackArguments, attack
from immunize_text_diffusion import fetch

from hf_immunize.diffusion import load_pipeline
from hf_immunize.diffusion.prompts import PromptArguments, PromptTask
from hf_immunize.errors import ImmunizeError
from hf_immunize.options import parse_options


def main() -> None:
    given, options = parse_options((PromptArguments, AttackArguments), description=__doc__.splitlines()[0])
    folder = fetch(options.model_path)
    attack(PromptTask(given, load_pipeline(folder)), replace(options, model_path=folder))


if __name__ == "__main__":
    try:
        main()
    except ImmunizeError as error:
        sys.exit(f"{type(error).__name__}: {error}")
