"""Immunize a model against a harmful task, and write down how: a classifier, or a diffusion pipeline.

    accelerate launch recipes/immunize.py --config recipes/digits-vit/task.yaml \
        --config recipes/digits-vit/closed_form_adversary.yaml

With from_scratch there is no theta_0: random weights learn the primary task under the regularizers from the first step
(recipes/digits-vit/pretrain_immunized.yaml).
"""

from hf_immunize.stages.immunize import main
from hf_immunize.stages.words import run_script

if __name__ == "__main__":
    run_script(main)
