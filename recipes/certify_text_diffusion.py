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

from hf_immunize.diffusion import component_of, load_pipeline
from hf_immunize.diffusion.prompts import PromptArguments, PromptTask
from hf_immunize.errors import ImmunizeError, ModelError
from hf_immunize.options import parse_options
from hf_immunize.records import sha256_file, weight_files


def check_encoders(model_path: str, base_path: str, component: str) -> None:
    """Both pipelines must encode images and prompts alike, or their losses are not of one task."""
    other = [
        {path.relative_to(folder).as_posix(): sha256_file(path) for path in weight_files(folder)
         if path.relative_to(folder).parts[0] != component}
        for folder in (model_path, base_path)
    ]
    if other[0] != other[1]:
        names = sorted(name for name in other[0].keys() | other[1].keys() if other[0].get(name) != other[1].get(name))
        raise ModelError(
            f"expected pipelines that differ in {component} alone, got other weights in {names}: the exam asks both "
            "about the same latents and prompts."
        )


def main(argv: Sequence[str] | None = None) -> None:
    given, arguments = parse_options((PromptArguments, CertifyArguments), argv, description=__doc__)
    arguments = replace(arguments, base_path=fetch(arguments.base_path))
    base = load_pipeline(arguments.base_path)
    check_encoders(arguments.model_path, arguments.base_path, component_of(base))
    certify(PromptTask(given, base), arguments)


if __name__ == "__main__":
    try:
        main()
    except ImmunizeError as error:
        sys.exit(f"{type(error).__name__}: {error}")
