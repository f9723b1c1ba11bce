"""A dataset-level spectrum as evidence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean

from hf_immunize.records.base import Interval, Part


class SpectrumRecord(Part):
    """Spectrum of the second moment of one site's features over one whole data split."""

    site: str
    """Module name whose input was captured, e.g. ``classifier``."""
    task: str
    """``primary`` or ``harmful``."""
    rows: int
    width: int
    rank: int
    status: str
    centered: bool
    feature_dtype: str
    condition_number: float | None
    """κ over the nonzero spectrum; null when it is not defined."""
    effective_rank: float | None
    eigenvalues: list[float]
    """All min(rows, width) eigenvalues of ΦᵀΦ/N, descending, of which the first ``rank`` are above the noise."""
    spectral_steps: float | None = None
    """T_0.2 (docs/method.md, section 3): steps at rate 1/σ₁ to a residual of 20 %; null when it is out of reach."""
    condition_of_halves: list[float | None] = []
    """κ of halves of the same rows, the same halves for every model; empty where there are too few rows."""

    @property
    def condition_spread(self) -> Interval | None:
        """κ with the spread that another choice of rows would give it."""
        return half_sample_interval(self.condition_number, self.condition_of_halves)


def half_sample_interval(
    whole: float | None, halves: Sequence[float | None], level: float = 0.95
) -> Interval | None:
    """A positive figure with the spread over halves of its rows, on a log scale.

    Delete-half jackknife (Shao & Tu 1995, section 2.3), for which deviations of halves from the whole are as large as
    those of the whole from the truth; a drift with the number of rows, which κ has, counts as spread. None where the
    figure is not defined on the whole or on some half.
    """
    known = [half for half in halves if half is not None and half > 0]
    if whole is None or whole <= 0 or not known or len(known) < len(halves):
        return None
    error = math.sqrt(fmean(math.log(half / whole) ** 2 for half in known))
    factor = math.exp(NormalDist().inv_cdf((1 + level) / 2) * error)
    return Interval(estimate=whole, low=whole / factor, high=whole * factor, level=level, samples=len(known))
