"""What a term is, and what it sees: rows of one task at one site, or at several sites at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from hf_immunize.linalg import Spectrum, second_moment_spectra

Side = Literal["primary", "harmful"]


class Rows:
    """Features (N×D) and labels (N) of one task's global batch; the spectrum is computed once, when asked for.

    Terms that say so (``Term.stacked``) get the features of several sites of one width at once, S×N×D over the same
    labels: then every number of the spectrum and every tensor of the memory is one per site, S of them in front.
    """

    def __init__(self, features: Tensor, labels: Tensor, feature_dtype: torch.dtype | None = None):
        self.features, self.labels = features, labels
        self.feature_dtype = feature_dtype or features.dtype
        """dtype the model computed the features in; it sets what counts as rounding noise."""
        self.memory: dict[str, Tensor] = {}
        """Tensors that a term keeps from step to step, its own at each site; saved in checkpoints."""

    @cached_property
    def spectrum(self) -> Spectrum:
        """Centred, rank-aware spectrum of these rows' second moment."""
        return second_moment_spectra(self.features, feature_dtype=self.feature_dtype)

    def group_spectra(self, size: int) -> list[Spectrum]:
        """Spectra of consecutive groups of ``size`` rows (all rows when there are fewer).

        n centred rows span n − 1 directions, those of the most energy. A small group shows a term the directions an
        attacker uses first; the whole batch shows it the smallest ones.
        """
        count = self.features.shape[-2]
        if size >= count:
            return [self.spectrum]
        whole = torch.unflatten(self.features[..., : count - count % size, :], -2, (count // size, size))
        return second_moment_spectra(whole, feature_dtype=self.feature_dtype).unbind(whole.dim() - 3)

    @cached_property
    def sites(self) -> list[Rows]:
        """Of a stack: the rows of each site, with the spectra of all computed at once when the first is asked for."""
        return [_OfStack(self, place) for place in range(len(self.features))]

    @cached_property
    def _spectra(self) -> list[Spectrum]:
        return self.spectrum.unbind()


class _OfStack(Rows):
    """One site's rows of a stack."""

    def __init__(self, stack: Rows, place: int):
        super().__init__(stack.features[place], stack.labels, stack.feature_dtype)
        self._stack, self._place = stack, place

    @cached_property
    def spectrum(self) -> Spectrum:
        """Of these rows, from the one decomposition of the whole stack."""
        return self._stack._spectra[self._place]


@dataclass(frozen=True)
class TermSettings:
    """The options a term may depend on (see ImmunizationConfig for their meaning)."""

    horizons: tuple[float, ...] = (30.0, 300.0, 3000.0)
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
    stops_closed_form: bool = False
    """Whether it is against a probe in closed form, so that such a probe can say whether it worked."""
    stacked: bool = False
    """Whether ``measure`` takes a stack of several sites' features (S×N×D, see Rows) and returns S values, each of its
    own site alone. Saves time; a term that does not is measured site by site."""
    is_log: bool = False
    """Whether its values are logarithms themselves: 0.05 less is then a twentieth less of what it measures."""
    conditions: bool = False
    """Whether it is against attackers who descend the raw gradient, so that the steps of one say whether it worked."""
    of_scale: bool = False
    """Whether features times a number change its value, which holds nobody up: it does not say that a run worked."""
    achieves: str = ""
    """Said of a run that lowered it: what that means, and whom it does not stop."""

    def progress(self, value: float) -> float:
        """A number that falls as the term is minimised, on a scale on which averages mean something."""
        return float(torch.tensor(value, dtype=torch.get_default_dtype()).log()) if self.logarithmic else value
