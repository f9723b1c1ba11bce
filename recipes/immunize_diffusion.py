"""recipes/immunize.py for a pipeline whose concepts are classes."""

from functools import partial

from hf_immunize.stages.base import ImmunizeOptions as BaseArguments
from hf_immunize.stages.immunize import main as immunize
from hf_immunize.stages.words import run_script

__all__ = ["BaseArguments", "main"]

main = partial(immunize, family="concepts")

if __name__ == "__main__":
    run_script(main)
