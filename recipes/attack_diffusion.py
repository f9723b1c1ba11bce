"""recipes/attack.py for a pipeline whose concepts are classes."""

from functools import partial

from hf_immunize.stages.attack import main as attack
from hf_immunize.stages.words import run_script

main = partial(attack, family="concepts")

if __name__ == "__main__":
    run_script(main)
