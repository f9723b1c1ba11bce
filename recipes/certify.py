"""Judge an attacked model against its attacked base: write certificate.json and the model card README.md.

    accelerate launch recipes/certify.py --config recipes/digits-vit/task.yaml \
        --model_path runs/digits-vit/closed_form_adversary --base_path runs/digits-vit/base
"""

from hf_immunize.stages.certify import main
from hf_immunize.stages.words import run_script

if __name__ == "__main__":
    run_script(main)
