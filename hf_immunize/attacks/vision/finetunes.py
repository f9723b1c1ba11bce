"""Attacks that train the network after some preparation, one row each."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from torch import nn

from hf_immunize.attacks.core.shape import Attack, Run, setting
from hf_immunize.attacks.vision._normal_form import canonical_model, what_was_done
from hf_immunize.attacks.vision._norms import is_norm, reset_norms
from hf_immunize.attacks.vision._peft import ALL_LINEAR, AdapterConfig, adapt
from hf_immunize.attacks.vision._phases import from_the_input
from hf_immunize.attacks.vision._row import low_rates, row
from hf_immunize.attacks.vision.context import AttackContext
from hf_immunize.attacks.vision.heal import heal, healing
from hf_immunize.attacks.vision.ridge_head_finetune import set_ridge_head
from hf_immunize.errors import ModelError


def plain_lora(told: Any, targets: list[str]) -> LoraConfig:
    """PEFT's config of low-rank updates."""
    return LoraConfig(r=told.rank, lora_alpha=told.alpha, target_modules=targets)


def _canonical(context: AttackContext, planned: Run) -> nn.Module | str:
    model = canonical_model(context, planned.seed)
    return model if isinstance(model, str) else model.requires_grad_(True)


def _canonical_lora(context: AttackContext, planned: Run) -> nn.Module | str:
    model = canonical_model(context, planned.seed)
    return model if isinstance(model, str) else adapt(context, planned, plain_lora, model)


def _lora(context: AttackContext, planned: Run) -> nn.Module | str:
    return adapt(context, planned, plain_lora)


def _probed(context: AttackContext, planned: Run) -> nn.Module:
    model = context.model_with_new_head(planned.seed)
    set_ridge_head(context, model, planned)
    return model


def _probed_lora(context: AttackContext, planned: Run) -> nn.Module | str:
    return adapt(context, planned, plain_lora, _probed(context, planned))


def _healed(context: AttackContext, planned: Run) -> nn.Module:
    model = heal(context, context.model(planned.seed), planned.config, planned.seed)
    return context.with_new_head(model, planned.seed).requires_grad_(True)


def _new_norms(context: AttackContext, planned: Run) -> nn.Module | str:
    model = context.model(planned.seed)
    if not any(is_norm(module) for module in model.modules()):
        return "the model has no normalisation layer"
    return context.with_new_head(reset_norms(model, context, planned.seed), planned.seed).requires_grad_(True)


def _layerwise(context: AttackContext, planned: Run) -> nn.Module | str:
    model = context.model_with_new_head(planned.seed).requires_grad_(True)
    try:
        return from_the_input(model, context.head, planned.config)
    except ModelError as error:
        return str(error)


def _adapter(told: str, covers: str, prepare: Any, note: Any = None, **settings: Any) -> Attack:
    """A row of low-rank updates of every linear layer, ordinary settings always among its trials."""
    return row(
        told, covers, prepare=prepare, note=note, family="LoRA", base=AdapterConfig,
        rank=setting(8, "Rank of each update."),
        alpha=setting(16, "Updates are scaled by alpha/rank."),
        targets=setting(ALL_LINEAR, "Regular expression over module names, or all-linear: every linear layer and every "
                                    "convolution without groups, but the head."),
        # nothing but the rate is searched, so that a small search is the whole grid and holds rank 8 at 1e-3
        learning_rate=setting(1e-3, "Peak learning rate.", sweep=(1e-4, 1e-3, 1e-2, 1e-1),
                              search=(1e-4, 1e-3, 1e-2, 1e-1)),
        **{"batch_size": 32, "scheduler": "constant", "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": 1.0},
        **settings,
    )  # fmt: skip


FINETUNES: dict[str, Attack] = {
    "lora_all_linear": _adapter(
        "AdamW on low-rank updates of every linear layer (rank 8 at 1e-3 among the trials), and on a new head.",
        "a defence of the query and value projections alone", _lora,
    ),
    "probe_then_lora": _adapter(
        "The head is set to a ridge probe, then AdamW on low-rank updates of every linear layer.",
        "a random head that spends the first steps", _probed_lora,
        penalty=setting(1e-4, "Ridge penalty relative to σ₁² of the standardized features."),
        temperature=setting(8.0, "Logits per unit of the probe's one-hot output."),
    ),
    "canonical_lora": _adapter(
        "AdamW on low-rank updates of every linear layer of the normal form, and on a new head.",
        "the same changes of coordinates, for LoRA", _canonical_lora, note=what_was_done,
    ),
    "canonical_finetune": row(
        "AdamW on all weights of the normal form (scales, products and dropout undone), with a new head.",
        "changes of coordinates that keep the function: scaled gains, weights before norms, neighbours that divide "
        "each other's scale away, stretched queries and keys; dropout in the config",
        prepare=_canonical, note=what_was_done, learning_rate=low_rates(),
    ),
    "relative_finetune": row(
        "All weights and a new head, by steps in units of each tensor's own length (LAMB, or Adafactor with relative "
        "steps).",
        "weights of any scale, where no normal form is found",
        learning_rate=setting(1e-2, "Length of a step relative to the tensor's.", sweep=(1e-3, 1e-2, 1e-1, 1.0)),
        optimizer=setting("lamb", "lamb or adafactor_relative.", sweep=("lamb", "adafactor_relative")),
    ),
    "head_rate_finetune": row(
        "AdamW on all weights, with a higher rate for the new head.",
        "a network that breaks at rates at which a head still learns slowly",
        learning_rate=setting(1e-4, "Peak learning rate of all but the head.", sweep=(1e-6, 1e-5, 1e-4, 1e-3)),
        optimizer=setting("adamw_head", "adamw_head: AdamW with a rate of its own for the head."),
        head_factor=setting(100.0, "The head's rate in units of the others'."),
    ),
    "heal_finetune": row(
        "AdamW on all weights after the model was tuned on noisy images towards its own outputs.",
        "failures that only hold at one place of weight space",
        prepare=_healed, spent=healing, family="structural", learning_rate=low_rates(),
        share=setting(0.3, "Share of the steps that is spent on noisy images."),
        pixel_noise=setting(0.5, "Standard deviation of their noise, in units of the pixels'."),
        heal_rate=setting(1e-3, "Learning rate meanwhile."),
    ),
    "reset_norms_finetune": row(
        "AdamW on all weights after every norm was given gain 1 and shift 0, batch norms the attacker's statistics.",
        "gains and shifts that switch channels off, statistics of other images",
        prepare=_new_norms, family="structural", learning_rate=low_rates(),
    ),
    "large_batch_finetune": row(
        "AdamW on all weights and a new head, on large batches.",
        "gradients that are mostly noise",
        learning_rate=low_rates(),
        batch_size=setting(128, "Rows per step.", search=(128, 256)),
    ),
    "layerwise_finetune": row(
        "AdamW on the blocks one part after the other from the input side, then on all weights, with a new head.",
        "late layers whose gradients drown all others",
        prepare=_layerwise, learning_rate=low_rates(),
        share=setting(0.5, "Share of the steps that trains one part at a time."),
        parts=setting(4, "Parts of the trunk."),
    ),
}  # fmt: skip
"""By name. ``covers`` says what each undoes."""
