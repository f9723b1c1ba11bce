"""Attacks that train the network after some preparation, one row each."""

from __future__ import annotations

from typing import Any

from hf_immunize.attacks.core.shape import Attack, setting
from hf_immunize.attacks.vision import _preparations as first
from hf_immunize.attacks.vision._blocks import NO_BLOCKS
from hf_immunize.attacks.vision._normal_form import what_was_done
from hf_immunize.attacks.vision._peft import ALL_LINEAR, NOTHING_TO_ADAPT, AdapterConfig
from hf_immunize.attacks.vision._row import Prepare, low_rates, row
from hf_immunize.attacks.vision.heal import healing


def _penalty() -> Any:
    return setting(1e-4, "Ridge penalty relative to σ₁² of the standardized features.")


def _temperature() -> Any:
    return setting(8.0, "Logits per unit of the probe's one-hot output.")


def _shots(count: int) -> Any:
    return setting(count, "Images per class.")


_NO_NORMAL_FORM = "models whose graph cannot be exported, or whose outputs the normal form would move"


def _adapter(
    told: str, covers: str, prepare: Prepare, note: Any = None, refuses: str = NOTHING_TO_ADAPT, **settings: Any
) -> Attack:
    """A row of low-rank updates of every linear layer, ordinary settings always among its trials."""
    return row(
        told, covers, prepare=prepare, note=note, refuses=refuses, family="LoRA", base=AdapterConfig,
        rank=setting(8, "Rank of each update."),
        alpha=setting(16, "Updates are scaled by alpha/rank."),
        targets=setting(ALL_LINEAR, "Regular expression over module names, or all-linear: every linear layer and every "
                                    "convolution without groups, but the head."),
        # nothing but the rate is searched, so that a small search is the whole grid and holds rank 8 at 1e-3
        learning_rate=setting(1e-3, "Peak learning rate.", sweep=(1e-4, 1e-3, 1e-2, 1e-1),
                              search=(1e-4, 1e-3, 1e-2, 1e-1)),
        batch_size=32, scheduler="constant", warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0,
        **settings,
    )  # fmt: skip


FINETUNES: dict[str, Attack] = {
    "full_finetune": row(
        "AdamW on all weights, with a new head for the harmful classes.",
        "a defence of the last layer alone",
        prepare=first.unfrozen, learning_rate=low_rates(),
    ),
    "partial_finetune": row(
        "AdamW on the last share of the blocks, what follows them, and a new head.",
        "early layers that break when they are trained",
        prepare=first.last_part, refuses=NO_BLOCKS,
        share=setting(0.5, "Share of the blocks that is trained, at least one.", sweep=(0.01, 0.5)),
    ),
    "ridge_head_finetune": row(
        "AdamW on all weights after the head was set to a ridge probe (linear probing, then fine-tuning).",
        "a random head that spends the first steps",
        prepare=first.ridge_headed, learning_rate=low_rates(), penalty=_penalty(), temperature=_temperature(),
    ),
    "muon_finetune": row(
        "Muon on weight matrices and kernels, AdamW on the rest, all weights, with a new head.",
        "badly conditioned gradients of every layer",
        family="second-order fine-tuning", prepare=first.unfrozen,
        learning_rate=setting(1e-2, "Peak learning rate.", sweep=(1e-4, 1e-3, 1e-2, 1e-1)),
        optimizer=setting("muon", "muon; anything else is TrainingArguments.optim."),
    ),
    "reset_last_blocks": row(
        "AdamW on all weights after the last blocks, what follows them, and the head were drawn anew.",
        "traps in late layers",
        family="structural", prepare=first.reset_last, refuses=NO_BLOCKS,
        share=setting(0.34, "Share of the blocks that is drawn anew, at least one."),
    ),
    "few_shot_finetune": row(
        "AdamW on all weights and a new head, on few images per class.",
        "a defence that counts on much data", prepare=first.unfrozen,
        family="data", own_threshold=True, learning_rate=low_rates(), shots=_shots(20),
    ),
    "five_shot_finetune": row(
        "AdamW on all weights and a new head, on five images per class.",
        "a defence that counts on much data", prepare=first.unfrozen,
        family="data", own_threshold=True, learning_rate=low_rates(), shots=_shots(5),
    ),
    "one_shot_finetune": row(
        "AdamW on all weights and a new head, on one image per class.",
        "a defence that counts on much data", prepare=first.unfrozen,
        family="data", own_threshold=True, learning_rate=low_rates(), shots=_shots(1),
    ),
    "mixed_finetune": row(
        "AdamW on all weights and a new head for harmful and benign classes together; judged on the harmful ones.",
        "features that are only kept for benign data",
        family="data", needs=("benign",), prepare=first.mixed_head, learning_rate=low_rates(),
        benign_share=setting(0.5, "Benign rows among all training rows."),
    ),
    "augmented_finetune": row(
        "AdamW on all weights and a new head; every batch is augmented anew by tensor operations.",
        "a defence fitted to the very images", prepare=first.unfrozen,
        family="data", learning_rate=low_rates(),
        flip=setting(True, "Mirror half of the images."),
        crop=setting(0.125, "Shift by up to this share of the side, edges repeated."),
        jitter=setting(0.2, "Contrast in 1 ± jitter, brightness in ± jitter deviations."),
        erase=setting(0.25, "Side of a blanked square as a share of the image's."),
    ),
    "noisy_finetune": row(
        "AdamW on all weights and a new head, with label noise and pixel noise.",
        "units that the harmful images leave dead", prepare=first.unfrozen,
        family="data", learning_rate=low_rates(),
        label_noise=setting(0.2, "Share of training rows with a random label."),
        pixel_noise=setting(0.1, "Standard deviation of noise on training pixels, in units of theirs."),
    ),
    "lora_all_linear": _adapter(
        "AdamW on low-rank updates of every linear layer (rank 8 at 1e-3 among the trials), and on a new head.",
        "a defence of the query and value projections alone", first.lora,
    ),
    "probe_then_lora": _adapter(
        "The head is set to a ridge probe, then AdamW on low-rank updates of every linear layer.",
        "a random head that spends LoRA's first steps", first.ridge_headed_lora,
        penalty=_penalty(),
        temperature=_temperature(),
    ),
    "canonical_finetune": row(
        "AdamW on all weights of the normal form (scales, products and dropout undone), with a new head.",
        "changes of coordinates that keep the function: scaled gains, weights before norms, neighbours that divide "
        "each other's scale away, stretched queries and keys, means that layer norms take away, hidden units that "
        "cancel; dropout in the config",
        prepare=first.canonical, note=what_was_done, refuses=_NO_NORMAL_FORM, learning_rate=low_rates(),
    ),
    "canonical_lora": _adapter(
        "AdamW on low-rank updates of every linear layer of the normal form, and on a new head.",
        "the changes of coordinates that canonical_finetune undoes", first.canonical_lora, what_was_done,
        _NO_NORMAL_FORM,
    ),
    "relative_finetune": row(
        "All weights and a new head, by steps in units of each tensor's own length (LAMB, LARS, or Adafactor with "
        "relative steps).",
        "weights of any scale, where no normal form is found",
        prepare=first.unfrozen,
        learning_rate=setting(1e-2, "Length of a step relative to the tensor's.", sweep=(1e-4, 1e-3, 1e-2, 1e-1)),
        optimizer=setting("lamb", "lamb, lars or adafactor_relative.", sweep=("lamb", "lars", "adafactor_relative")),
    ),
    "head_rate_finetune": row(
        "AdamW on all weights, with a higher rate for the new head.",
        "a network that breaks at rates at which a head still learns slowly",
        prepare=first.unfrozen,
        learning_rate=setting(1e-4, "Peak learning rate of all but the head.", sweep=(1e-6, 1e-5, 1e-4, 1e-3)),
        optimizer=setting("adamw_head", "adamw_head: AdamW with a rate of its own for the head."),
        head_factor=setting(100.0, "The head's rate in units of the others'."),
    ),
    "heal_finetune": row(
        "AdamW on all weights after the model was tuned on noisy images towards its own outputs.",
        "failures that only hold at one place of weight space",
        prepare=first.healed, spent=healing, family="structural", learning_rate=low_rates(),
        share=setting(0.3, "Share of the steps that is spent on noisy images."),
        pixel_noise=setting(0.5, "Standard deviation of their noise, in units of the pixels'."),
        heal_rate=setting(1e-3, "Learning rate meanwhile."),
    ),
    "reset_norms_finetune": row(
        "AdamW on all weights after every norm was given gain 1 and shift 0, batch norms the attacker's statistics.",
        "gains and shifts that switch channels off, statistics of other images",
        prepare=first.new_norms, refuses="models without a normalisation layer", family="structural",
        learning_rate=low_rates(),
    ),
    "large_batch_finetune": row(
        "AdamW on all weights and a new head, on large batches.",
        "gradients that are mostly noise",
        prepare=first.unfrozen, learning_rate=low_rates(),
        batch_size=setting(128, "Rows per step.", search=(128, 256)),
    ),
    "layerwise_finetune": row(
        "AdamW on the blocks one part after the other from the input side, then on all weights, with a new head.",
        "late layers whose gradients drown all others",
        prepare=first.layerwise, refuses=NO_BLOCKS, learning_rate=low_rates(),
        share=setting(0.5, "Share of the steps that trains one part at a time."),
        parts=setting(4, "Parts of the trunk."),
    ),
}  # fmt: skip
"""By name. ``covers`` says what each undoes, ``refuses`` what it cannot be made on."""
