"""recipes/certify.py for a pipeline whose concepts are classes."""

from functools import partial

from hf_immunize.stages.certify import main as certify
from hf_immunize.stages.words import run_script

main = partial(certify, family="concepts")

if __name__ == "__main__":
    run_script(main)
