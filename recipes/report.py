"""Draw one self-contained page that compares a base with its immunized models, and print their verdicts.

    python recipes/report.py --base_path runs/digits-vit/base --output runs/digits-vit/report.html \
        --model_paths runs/digits-vit/condition_number runs/digits-vit/closed_form_adversary
"""

from hf_immunize.stages.report import main
from hf_immunize.stages.words import run_script

if __name__ == "__main__":
    run_script(main)
