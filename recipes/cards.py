"""Render the model cards that this repository keeps, from finished runs.

    python recipes/cards.py --model_paths runs/digits-vit/condition_number runs/digits-vit/closed_form_adversary \
        --output model_cards/digits-vit
"""

from hf_immunize.stages.cards import main
from hf_immunize.stages.words import run_script

if __name__ == "__main__":
    run_script(main)
