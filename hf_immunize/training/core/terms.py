"""What immunization adds to the primary loss: terms on captured features, each a value and a gradient.

An objective is a sum of terms. A term sees rows of features and their labels, nothing of the trainer, the model or
the devices; a new one is added with ``register_objective`` (``registry.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from hf_immunize.linalg import Spectrum, second_moment_spectrum, to_double
from hf_immunize.regularizers import (
    attacker_training_loss,
    closed_form_adversary,
    ill_conditioned,
    log_condition,
    simulated_attacker,
    well_conditioned,
)

Side = Literal["primary", "harmful"]


class Rows:
    """Features (N×D) and labels (N) of one task's global batch; the spectrum is computed once, when asked for."""

    def __init__(self, features: Tensor, labels: Tensor, feature_dtype: torch.dtype | None = None):
        self.features, self.labels = features, labels
        self.feature_dtype = feature_dtype or features.dtype
        """dtype the model computed the features in; it sets what counts as rounding noise."""
        self.memory: dict[str, Tensor] = {}
        """Tensors that a term keeps from step to step, its own at each site; saved in checkpoints."""

    @cached_property
    def spectrum(self) -> Spectrum:
        """Centred, rank-aware spectrum of these rows' second moment."""
        return second_moment_spectrum(self.features, feature_dtype=self.feature_dtype)

    def group_spectra(self, size: int) -> list[Spectrum]:
        """Spectra of consecutive groups of ``size`` rows (all rows when there are fewer).

        n centred rows span n − 1 directions, those of the most energy. A small group shows a term the directions an
        attacker uses first; the whole batch shows it the smallest ones.
        """
        count = len(self.features)
        if size >= count:
            return [self.spectrum]
        groups = self.features[: count - count % size].split(size)
        return [second_moment_spectrum(group, feature_dtype=self.feature_dtype) for group in groups]


@dataclass(frozen=True)
class TermSettings:
    """The options a term may depend on (see ImmunizationConfig for their meaning)."""

    horizons: tuple[float, ...] = (100.0,)
    memorization: float = 0.0
    group_rows: int = 32
    attacker_steps: int = 4
    harmful_classes: int | None = None
    """Classes of the harmful task; by default as many as the labels of a batch show."""


@dataclass(frozen=True)
class Term:
    """One scalar to be minimised on one side's rows."""

    name: str
    side: Side
    measure: Callable[[Rows, TermSettings], Tensor]
    logarithmic: bool = False
    """Whether progress is better compared on a log scale (values that span decades)."""
    full_precision: bool = False
    """Whether its gradient is that of the batch's smallest eigenvalue, where rounding to bfloat16 ends up: refused
    under bf16 autocast."""
    tells_classes_apart: bool = False
    """Whether it is a classifier's score: with one class there is nothing to measure."""

    def progress(self, value: float) -> float:
        """A number that falls as the term is minimised, on a scale on which averages mean something."""
        return float(torch.tensor(value, dtype=torch.get_default_dtype()).log()) if self.logarithmic else value


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
    return torch.stack(at_horizons).mean()


def _attackers_view(rows: Rows, settings: TermSettings) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """Features as imma's attacker sees them, its last weights (zeros at first), and its rate.

    Features are divided by √λ₁, detached, so that the defender cannot win by rescaling: then curvature is at most 1
    on half of the rows, bias included, and rate 1 is safe.
    """
    classes = settings.harmful_classes or int(rows.labels.max()) + 1
    weights, bias = rows.memory.get("weights"), rows.memory.get("bias")
    if weights is None or bias is None or weights.shape != (rows.features.shape[1], classes):
        weights, bias = rows.features.new_zeros(rows.features.shape[1], classes), rows.features.new_zeros(classes)
    largest = rows.spectrum.largest.detach()
    scaled = rows.features / largest.clamp(min=torch.finfo(largest.dtype).tiny).sqrt()
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
    return -torch.stack([log_condition(part) for part in rows.group_spectra(settings.group_rows)]).mean()


R_ILL = Term("harmful_r_ill", "harmful", lambda rows, _: ill_conditioned(rows.spectrum), logarithmic=True)
R_WELL = Term("primary_r_well", "primary", lambda rows, _: well_conditioned(rows.spectrum), logarithmic=True)
LOG_KAPPA_H = Term(
    "harmful_negative_log_kappa", "harmful", lambda rows, _: -log_condition(rows.spectrum), full_precision=True
)
LOG_KAPPA_P = Term(
    "primary_log_kappa", "primary", lambda rows, _: log_condition(rows.spectrum), full_precision=True
)
GROUP_KAPPA = Term("harmful_negative_group_log_kappa", "harmful", _group_log_kappa)
ADVERSARY = Term("harmful_adversary_r2", "harmful", _adversary, tells_classes_apart=True)
IMMA = Term("harmful_attacker_gain", "harmful", _imma, tells_classes_apart=True)

@dataclass
class Evaluated:
    """Values of all terms on one global batch and their gradients at the features."""

    values: dict[str, Tensor]
    gradients: dict[str, Tensor]
    """Per term, d value / d features of its side, N×D float64 of the global batch."""
    rows: Mapping[Side, Rows]
    """What was measured: the batch, then rows of earlier steps."""


def evaluate_terms(
    terms: tuple[Term, ...],
    rows: Mapping[Side, Rows],
    settings: TermSettings,
    *,
    past: Mapping[Side, Rows] | None = None,
    memory: dict[str, dict[str, Tensor]] | None = None,
) -> Evaluated:
    """Measure every term and its gradient at detached features of the global batch.

    Working on detached features keeps the graph of a d×d spectrum away from the model's, lets one set of features
    gathered from several ranks and micro-batches serve every term, and makes the gradient norm of each term known
    before anything is propagated.

    Args:
        past: rows of earlier steps that are measured together with the batch, without gradient.
        memory: per term, tensors it keeps between calls; changed in place.
    """
    memory = {} if memory is None else memory
    leaves = {side: to_double(part.features.detach()).requires_grad_() for side, part in rows.items()}
    measured = {side: _joined(leaves[side], part, (past or {}).get(side)) for side, part in rows.items()}
    values, gradients = {}, {}
    with torch.enable_grad():
        for term in terms:
            measured[term.side].memory = memory.setdefault(term.name, {})
            value = term.measure(measured[term.side], settings)
            # retain: terms of one side share its spectrum; allow_unused: relu(A_t) may be constant.
            (gradient,) = torch.autograd.grad(value, leaves[term.side], retain_graph=True, allow_unused=True)
            values[term.name] = value.detach()
            gradients[term.name] = torch.zeros_like(leaves[term.side]) if gradient is None else gradient
    return Evaluated(values, gradients, measured)


def _joined(leaf: Tensor, part: Rows, past: Rows | None) -> Rows:
    if past is None or len(past.features) == 0:
        return Rows(leaf, part.labels, part.feature_dtype)
    with torch.enable_grad():
        features = torch.cat([leaf, past.features.to(leaf)])
    return Rows(features, torch.cat([part.labels, past.labels.to(part.labels)]), part.feature_dtype)
