"""recipes/certify.py for a pipeline whose concepts are folders of images with prompts."""

from functools import partial

from hf_immunize.stages.certify import main as certify
from hf_immunize.stages.words import run_script

main = partial(certify, family="prompts")

if __name__ == "__main__":
    run_script(main)
