"""Train the base model that is to be immunized: a classifier, or a small class-conditional denoiser.

    accelerate launch recipes/pretrain.py --config recipes/digits-vit/task.yaml \
        --config recipes/digits-vit/pretrain.yaml
"""

from hf_immunize.stages.pretrain import main
from hf_immunize.stages.words import run_script

if __name__ == "__main__":
    run_script(main)
