"""Relative immunization ratio in two labelled modes: the right one, and the one the public reference code prints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hf_immunize.errors import ConfigError, SpectrumError
from hf_immunize.linalg.factor import factor_moment, feature_singular_values
from hf_immunize.linalg.spectrum import check_features, to_double

Mode = Literal["rank-aware", "paper-faithful"]
LABELS: dict[str, str] = {
    "rank-aware": "RIR (rank-aware: κ over the nonzero spectrum)",
    "paper-faithful": "RIR (paper-faithful: S + 1e-6·I, smallest eigenvalue above 1e-6; not a condition number when "
    "the rank is deficient)",
}
_PAPER_SHIFT = 1e-6


@dataclass(frozen=True)
class ImmunizationRatio:
    """RIR = (i)/(ii) with (i) the harmful and (ii) the primary ratio of κ after over before."""

    mode: Mode
    harmful_ratio: float
    primary_ratio: float
    ratio: float
    primary_before: float
    primary_after: float
    harmful_before: float
    harmful_after: float
    ranks: tuple[int, int, int, int] | None
    """Numerical ranks in the order of the four values above; None in paper-faithful mode, which has no ranks."""
    groups: int
    """Random row groups the ratios are means over; 0 = one value from all rows."""

    @property
    def label(self) -> str:
        """The name under which this number must be shown."""
        return LABELS[self.mode]


def paper_log_condition(moment_DD: Tensor) -> float:
    """log σ_max − log σ_min of S + 1e-6·I, σ_min the smallest eigenvalue *above* 1e-6, as the reference prints it.

    For parity only: on a rank-deficient S it is log(σ_max/1e-6) plus rounding noise (docs/linear.md, metric modes).

    Raises:
        SpectrumError: S that is not a finite square matrix, or without any eigenvalue above 1e-6.
    """
    check_features(moment_DD)
    if moment_DD.shape[0] != moment_DD.shape[1] or not bool(torch.isfinite(moment_DD).all()):
        raise SpectrumError(f"expected a finite square S, got shape {tuple(moment_DD.shape)} or NaN: pass XᵀX.")
    moment = to_double(moment_DD.detach())
    values = torch.linalg.eigvalsh(moment + _PAPER_SHIFT * torch.eye(len(moment), dtype=moment.dtype))
    above = values[values > _PAPER_SHIFT]
    if above.numel() == 0:
        raise SpectrumError("expected an eigenvalue of S + 1e-6 I above 1e-6, got none: S is zero or negative.")
    return float(values.max().log() - above.min().log())


def condition(matrix: Tensor, mode: Mode, *, is_moment: bool, tolerance: float | None = None) -> tuple[float, int]:
    """(κ of XᵀX, rank) of rows X, or of S itself; rank is 0 in paper-faithful mode, where it is not defined.

    Raises:
        ConfigError: an unknown mode.
        SpectrumError: a matrix without a spectrum.
    """
    if mode == "paper-faithful":
        moment = matrix if is_moment else matrix.double().T @ matrix.double()
        return float(torch.tensor(paper_log_condition(moment), dtype=torch.float64).exp()), 0
    if mode != "rank-aware":
        raise ConfigError(f"expected mode 'rank-aware' or 'paper-faithful', got {mode!r}.")
    if is_moment:
        factor = factor_moment(matrix, tolerance=tolerance)
        return factor.condition_number, factor.rank
    sigma, floor = feature_singular_values(matrix, tolerance=tolerance)
    rank = int((sigma > floor * sigma[0]).sum())
    return float((sigma[0] / sigma[rank - 1]).square()), rank


def relative_immunization_ratio(
    before: tuple[Tensor, Tensor],
    after: tuple[Tensor, Tensor],
    *,
    mode: Mode = "rank-aware",
    is_moment: bool = False,
    tolerance: float | None = None,
    groups: int = 0,
    group_rows: int = 100,
    seed: int = 0,
) -> ImmunizationRatio:
    """RIR of (primary, harmful) features before and after immunization (Zheng et al. 2025, section 5).

    Args:
        before: (primary, harmful) rows, N×D; or the second moments themselves with ``is_moment``.
        after: the same rows through the immunized extractor.
        mode: "rank-aware", or "paper-faithful" for comparison with published numbers.
        is_moment: the four matrices are D×D second moments.
        tolerance: rank tolerance on singular values of the rows; default by dtype and shape.
        groups: mean over this many random groups of ``group_rows`` rows (the paper's deep protocol: 20 of 100).
            Averages the three ratios separately, so the mean RIR is not the quotient of the means.
        group_rows: rows in a group (from ``seed``, without replacement); the same rows before and after.

    Raises:
        ConfigError: an unknown mode, or groups of second moments.
        SpectrumError: row counts that differ before and after, too few rows for a group, or no spectrum.
    """
    if groups and is_moment:
        raise ConfigError("expected rows for a per-group mean, got second moments: pass features or groups=0.")
    for old, new in zip(before, after, strict=True):
        _check_rows(old, new, group_rows if groups else 1)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(max(groups, 1)):
        values = []
        for old, new in zip(before, after, strict=True):
            pick = torch.randperm(old.shape[0], generator=generator)[:group_rows] if groups else slice(None)
            values += [condition(m[pick], mode, is_moment=is_moment, tolerance=tolerance) for m in (old, new)]
        found.append(values)
    return ratio_of_conditions(mode, found, groups=groups)


def _check_rows(old: Tensor, new: Tensor, least: int) -> None:
    if old.shape[0] != new.shape[0]:
        raise SpectrumError(
            f"expected the same rows before and after, got {old.shape[0]} and {new.shape[0]}: pass features of one "
            "split through both extractors."
        )
    if old.shape[0] < least:
        raise SpectrumError(f"expected at least {least} rows for a group, got {old.shape[0]}: lower group_rows.")


def ratio_of_conditions(mode: Mode, found: list[list[tuple[float, int]]], *, groups: int = 0) -> ImmunizationRatio:
    """RIR from (κ, rank) of primary before, primary after, harmful before, harmful after; one such list per group."""
    table = torch.tensor([[value for value, _ in values] for values in found], dtype=torch.float64)
    primary, harmful = table[:, 1] / table[:, 0], table[:, 3] / table[:, 2]
    mean = table.mean(dim=0).tolist()
    ranks = [rank for _, rank in found[0]]
    return ImmunizationRatio(
        mode=mode,
        harmful_ratio=float(harmful.mean()),
        primary_ratio=float(primary.mean()),
        ratio=float((harmful / primary).mean()),
        primary_before=mean[0],
        primary_after=mean[1],
        harmful_before=mean[2],
        harmful_after=mean[3],
        ranks=None if mode == "paper-faithful" or groups else (ranks[0], ranks[1], ranks[2], ranks[3]),
        groups=groups,
    )
