"""The verbs that are stages, by name, with what ``hf-immunize --help`` says of each."""

STAGES = {
    "init": "Look at a model and its data, and write one run file for the whole main job.",
    "plan": "Check a run file without training: data, model, memory, disk, time.",
    "run": "Run all stages of a run file, or resume where it stopped.",
    "fetch": "Copy a trained model into a folder of its own.",
    "pretrain": "Train the base, or its head: classifiers, and small class-conditional denoisers.",
    "profile": "Find out in which layers the harmful task can be learned, before defending it.",
    "immunize": "Immunize a classifier or a diffusion pipeline against a harmful task.",
    "attack": "Attack a model and keep one trace (settings and learning curve) for each run.",
    "certify": "Judge an attacked model against its attacked base.",
    "cards": "Render the cards of finished runs, without weights and traces.",
    "linear": "Immunize linear models, from one YAML.",
    "recipes": "List the preset option files of this package, or copy them.",
}
"""Verbs that are modules of ``hf_immunize.stages``, imported when they are called: help must not wait for torch."""
