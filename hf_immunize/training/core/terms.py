"""What immunization adds to the primary loss: terms on captured features, each a value and a gradient.

An objective is a sum of terms. A term sees rows of features and their labels, nothing of the trainer, the model or
the devices; a new one is added with ``register_objective`` (``registry.py``).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from hf_immunize.regularizers import (
    attacker_training_loss,
    closed_form_adversary,
    ill_conditioned,
    log_condition,
    simulated_attacker,
    well_conditioned,
)
from hf_immunize.training.core.evaluation import Evaluated, evaluate_terms
from hf_immunize.training.core.measured import Rows, Side, Term, TermSettings

__all__ = ["Evaluated", "Rows", "Side", "Term", "TermSettings", "evaluate_terms"]


def _adversary(rows: Rows, settings: TermSettings) -> Tensor:
    at_horizons = [
        closed_form_adversary(
            rows.features,
            rows.labels,
            horizon=horizon,
            memorization=settings.memorization,
            feature_dtype=rows.feature_dtype,
        )
        for horizon in settings.horizons
    ]
    return torch.stack(at_horizons).mean(dim=0)


def _attackers_view(rows: Rows, settings: TermSettings) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """Features as imma's attacker sees them, its last weights (zeros at first), and its rate.

    Features are divided by √λ₁, detached, so that the defender cannot win by rescaling: then curvature is at most 1
    on half of the rows, bias included, and rate 1 is safe.
    """
    classes = settings.harmful_classes or int(rows.labels.max()) + 1
    *stack, _, width = rows.features.shape
    weights, bias = rows.memory.get("weights"), rows.memory.get("bias")
    if weights is None or bias is None or weights.shape != (*stack, width, classes):
        weights, bias = rows.features.new_zeros(*stack, width, classes), rows.features.new_zeros(*stack, classes)
    largest = rows.spectrum.largest.detach()
    scale = largest.clamp(min=torch.finfo(largest.dtype).tiny).sqrt()
    scaled = rows.features / scale[..., None, None]
    return scaled, (weights.to(rows.features), bias.to(rows.features)), torch.ones_like(largest)


def _imma(rows: Rows, settings: TermSettings) -> Tensor:
    scaled, start, rate = _attackers_view(rows, settings)
    value, (weights, bias) = simulated_attacker(scaled, rows.labels, start, rate=rate, steps=settings.attacker_steps)
    rows.memory |= {"weights": weights, "bias": bias}
    return value


def imma_training_loss(rows: Rows, settings: TermSettings) -> Tensor:
    """The loss that imma's attacker descends in what lies before its classifier; its memory is read, not changed."""
    scaled, start, rate = _attackers_view(rows, settings)
    return attacker_training_loss(scaled, rows.labels, start, rate=rate, steps=settings.attacker_steps)


def _group_log_kappa(rows: Rows, settings: TermSettings) -> Tensor:
    return -torch.stack([log_condition(part) for part in rows.group_spectra(settings.group_rows)]).mean(dim=0)


_SLOWED = "Conditioning slows attackers that follow the raw gradient, no others."
_PROBED = "Probes of these features find less; who trains the layers before them is not held up."
_FOLLOWED = "It holds up the attacker that was simulated; a probe in closed form is another one."

_stacked = partial(Term, stacked=True)
_conditioning = partial(_stacked, conditions=True, achieves=_SLOWED)
_of_classes = partial(_stacked, tells_classes_apart=True)
R_ILL = _conditioning(
    "harmful_r_ill", "harmful", lambda rows, _: ill_conditioned(rows.spectrum), logarithmic=True, of_scale=True
)
R_WELL = _stacked("primary_r_well", "primary", lambda rows, _: well_conditioned(rows.spectrum), logarithmic=True)
LOG_KAPPA_H = _conditioning(
    "harmful_negative_log_kappa", "harmful", lambda rows, _: -log_condition(rows.spectrum), full_precision=True,
    is_log=True,
)  # fmt: skip
LOG_KAPPA_P = _stacked(
    "primary_log_kappa", "primary", lambda rows, _: log_condition(rows.spectrum), full_precision=True, is_log=True
)
GROUP_KAPPA = _conditioning("harmful_negative_group_log_kappa", "harmful", _group_log_kappa, is_log=True)
ADVERSARY = _of_classes("harmful_adversary_r2", "harmful", _adversary, stops_closed_form=True, achieves=_PROBED)
IMMA = _of_classes("harmful_attacker_gain", "harmful", _imma, achieves=_FOLLOWED)
