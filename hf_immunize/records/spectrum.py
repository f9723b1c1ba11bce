"""A dataset-level spectrum as evidence."""

from __future__ import annotations

from hf_immunize.records.base import Part


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
