"""Judge an attacked text-to-image pipeline against its attacked base: write certificate.json and the model card.

    accelerate launch recipes/certify_text_diffusion.py --config recipes/stable-diffusion-1-5/task.yaml \
        --config recipes/stable-diffusion-1-5/certify.yaml --model_path runs/stable-diffusion-1-5/simulated_attack \
        --retain_images photos/retain --harmful_images photos/concept
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from certify_diffusion import CertifyArguments, certify
from immunize_text_diffusion import fetch

from hf_immunize.diffusion import load_pipeline
from hf_immunize.diffusion.prompts import PromptArguments, PromptTask
from hf_immunize.errors import ImmunizeError
from hf_immunize.options import parse_options


def main(argv: Sequence[str] | None = None) -> None:
    given, arguments = parse_options((PromptArguments, CertifyArguments), argv, description=__doc__)
    arguments = replace(arguments, base_path=fetch(arguments.base_path))
    certify(PromptTask(given, load_pipeline(arguments.base_path)), arguments)


if __name__ == "__main__":
    try:
        main()
    except ImmunizeError as error:
        sys.exit(f"{type(error).__name__}: {error}")
