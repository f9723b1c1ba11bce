"""What immunization adds to the primary loss: terms on captured features, each a value and a gradient.

An objective is a sum of terms. A term sees rows of features and their labels, nothing of the trainer, the model or
the devices; a new one is added with ``register_objective``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from hf_immunize.errors import ConfigError
from hf_immunize.linalg import Spectrum, second_moment_spectrum, to_double
from hf_immunize.regularizers import closed_form_adversary, ill_conditioned, log_condition, well_conditioned

Side = Literal["primary", "harmful"]


class Rows:
    """Features (N×D) and labels (N) of one task's global batch; the spectrum is computed once, when asked for."""

    def __init__(self, features: Tensor, labels: Tensor, feature_dtype: torch.dtype | None = None):
        self.features, self.labels = features, labels
        self.feature_dtype = feature_dtype or features.dtype
        """dtype the model computed the features in; it sets what counts as rounding noise."""

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

    horizon: float = 100.0
    memorization: float = 0.0
    group_rows: int = 32


@dataclass(frozen=True)
class Term:
    """One scalar to be minimised on one side's rows."""

    name: str
    side: Side
    measure: Callable[[Rows, TermSettings], Tensor]
    logarithmic: bool = False
    """Whether progress is better compared on a log scale (values that span decades)."""

    def progress(self, value: float) -> float:
        """A number that falls as the term is minimised, on a scale on which averages mean something."""
        return float(torch.tensor(value, dtype=torch.get_default_dtype()).log()) if self.logarithmic else value


def _adversary(rows: Rows, settings: TermSettings) -> Tensor:
    return closed_form_adversary(
        rows.features,
        rows.labels,
        horizon=settings.horizon,
        memorization=settings.memorization,
        feature_dtype=rows.feature_dtype,
    )


def _group_log_kappa(rows: Rows, settings: TermSettings) -> Tensor:
    return -torch.stack([log_condition(part) for part in rows.group_spectra(settings.group_rows)]).mean()


_R_ILL = Term("harmful_r_ill", "harmful", lambda rows, _: ill_conditioned(rows.spectrum), logarithmic=True)
_R_WELL = Term("primary_r_well", "primary", lambda rows, _: well_conditioned(rows.spectrum), logarithmic=True)
_LOG_KAPPA_H = Term("harmful_negative_log_kappa", "harmful", lambda rows, _: -log_condition(rows.spectrum))
_LOG_KAPPA_P = Term("primary_log_kappa", "primary", lambda rows, _: log_condition(rows.spectrum))
_GROUP_KAPPA = Term("harmful_negative_group_log_kappa", "harmful", _group_log_kappa)
_ADVERSARY = Term("harmful_adversary_r2", "harmful", _adversary)

OBJECTIVES: dict[str, tuple[Term, ...]] = {
    "condition_number": (_R_ILL, _R_WELL),
    "ill_only": (_R_ILL,),
    "opt_kappa": (_LOG_KAPPA_H, _LOG_KAPPA_P),
    "group_kappa": (_GROUP_KAPPA,),
    "closed_form_adversary": (_ADVERSARY,),
}


def register_objective(name: str, *terms: Term) -> None:
    """Make a new objective available to ``ImmunizationConfig(objective=name)``. Raises ConfigError for a taken name."""
    if name in OBJECTIVES or not terms:
        raise ConfigError(f"expected a new objective name with one term or more, got {name!r} with {len(terms)} terms.")
    OBJECTIVES[name] = terms


def terms_of(objective: str) -> tuple[Term, ...]:
    """Terms of one objective, or of several joined with '+'; a term named twice counts once.

    Raises:
        ConfigError: an unknown objective.
    """
    terms: dict[str, Term] = {}
    for name in objective.split("+"):
        if name.strip() not in OBJECTIVES:
            raise ConfigError(f"expected objectives among {sorted(OBJECTIVES)} joined with '+', got {name.strip()!r}.")
        terms.update({term.name: term for term in OBJECTIVES[name.strip()]})
    return tuple(terms.values())


@dataclass
class Evaluated:
    """Values of all terms on one global batch and their gradients at the features."""

    values: dict[str, Tensor]
    gradients: dict[str, Tensor]
    """Per term, d value / d features of its side, N×D float64 of the global batch."""
    rows: Mapping[Side, Rows]


def evaluate_terms(terms: tuple[Term, ...], rows: Mapping[Side, Rows], settings: TermSettings) -> Evaluated:
    """Measure every term and its gradient at detached features of the global batch.

    Working on detached features keeps the graph of a d×d spectrum away from the model's, lets one set of features
    gathered from several ranks and micro-batches serve every term, and makes the gradient norm of each term known
    before anything is propagated.
    """
    leaves = {
        side: Rows(to_double(part.features.detach()).requires_grad_(), part.labels, part.feature_dtype)
        for side, part in rows.items()
    }
    values, gradients = {}, {}
    with torch.enable_grad():
        for term in terms:
            value = term.measure(leaves[term.side], settings)
            # retain: terms of one side share its spectrum; allow_unused: relu(A_t) may be constant.
            (gradient,) = torch.autograd.grad(value, leaves[term.side].features, retain_graph=True, allow_unused=True)
            values[term.name] = value.detach()
            gradients[term.name] = torch.zeros_like(leaves[term.side].features) if gradient is None else gradient
    return Evaluated(values, gradients, leaves)
