"""Attack one model and leave one trace file per run: a classifier, or a diffusion pipeline, as the task says.

    accelerate launch recipes/attack.py --config recipes/digits-vit/task.yaml \
        --config recipes/digits-vit/attack.yaml --model_path runs/digits-vit/base --role control
"""

from hf_immunize.stages.attack import main
from hf_immunize.stages.words import run_script

if __name__ == "__main__":
    run_script(main)
