"""recipes/immunize.py for a pipeline whose concepts are folders of images with prompts."""

from functools import partial

from hf_immunize.stages.immunize import main as immunize
from hf_immunize.stages.words import run_script

main = partial(immunize, family="prompts")

if __name__ == "__main__":
    run_script(main)
