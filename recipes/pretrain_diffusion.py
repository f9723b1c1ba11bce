"""recipes/pretrain.py for a pipeline whose concepts are classes."""

from functools import partial

from hf_immunize.stages.pretrain import main as pretrain
from hf_immunize.stages.words import run_script

main = partial(pretrain, family="concepts")

if __name__ == "__main__":
    run_script(main)
