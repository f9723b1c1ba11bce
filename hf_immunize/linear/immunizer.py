"""LinearImmunizer: two tasks in, an extractor and what it is worth out."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from hf_immunize.errors import SpectrumError
from hf_immunize.linalg.factor import MomentFactor
from hf_immunize.linalg.pencil import CommonPencil, common_pencil
from hf_immunize.linear.closed_form import closed_form_theta
from hf_immunize.linear.descent import Descent, DescentConfig
from hf_immunize.linear.limits import ImmunizationLimit, common_range_conditions, limit_of
from hf_immunize.linear.metrics import ImmunizationRatio, Mode, condition, ratio_of_conditions
from hf_immunize.linear.tasks import LinearTask


@dataclass(frozen=True)
class LinearImmunization:
    """An immunized extractor: features become x @ theta_DD."""

    method: str
    theta_DD: Tensor
    """float64; transpose it for an nn.Linear weight."""
    settings: dict[str, Any]
    seconds: float
    """Wall time of the method itself, factors included where they were not computed before."""


@dataclass(frozen=True)
class LinearReport:
    """What one extractor does to both tasks. κ are over the nonzero spectrum, at the stated tolerance."""

    rank_aware: ImmunizationRatio
    paper_faithful: ImmunizationRatio
    common_ratio: float
    """RIR on the common range, where the limit theorem holds for every invertible θ."""
    limit_ratio: float
    limit_fraction: float
    """common_ratio/limit_ratio, at most 1 up to rounding."""
    primary_loss_before: float | None
    primary_loss: float | None
    """Mean squared error after refitting the head; None without labels."""
    harmful_loss_before: float | None
    harmful_loss: float | None
    tolerance: float


class LinearImmunizer:
    """Immunize a linear feature extractor against a harmful task (Zheng et al. 2025, docs/condition-number-limits.md).

    Args:
        primary: N×D rows of the task to keep, as tensor, array or ``datasets`` column; or a LinearTask.
        harmful: the same for the task to hinder.
        primary_labels: N targets; needed for losses and ``imma``.
        harmful_labels: N targets; needed for ``imma``.
        tolerance: singular values of the rows at or below tolerance·σ₁ count as zero; default max(N, D)·eps.

    Raises:
        DataError, SpectrumError: as for LinearTask.of_features; also for widths that differ.
    """

    def __init__(
        self,
        primary: Any,
        harmful: Any,
        *,
        primary_labels: Any = None,
        harmful_labels: Any = None,
        tolerance: float | None = None,
    ):
        started = time.perf_counter()
        self.primary = _task(primary, primary_labels, tolerance)
        self.harmful = _task(harmful, harmful_labels, tolerance)
        self._factor_seconds = time.perf_counter() - started
        if self.primary.factor.width != self.harmful.factor.width:
            raise SpectrumError(
                f"expected tasks of one width, got {self.primary.factor.width} and {self.harmful.factor.width}: use "
                "the same features for both."
            )

    @classmethod
    def from_moments(cls, primary: Any, harmful: Any, *, tolerance: float | None = None) -> LinearImmunizer:
        """From second moments K_P, K_H alone. Raises SpectrumError for matrices that are none."""
        return cls(
            LinearTask.of_moment(primary, tolerance=tolerance), LinearTask.of_moment(harmful, tolerance=tolerance)
        )

    @cached_property
    def pencil(self) -> CommonPencil:
        """The generalized eigenproblem. Raises SpectrumError when the ranges share no direction."""
        return common_pencil(self.primary.factor, self.harmful.factor)

    @cached_property
    def limit(self) -> ImmunizationLimit:
        """What any linear extractor can reach, and whether that is worth anything."""
        return limit_of(self.primary.factor, self.harmful.factor, self.pencil)

    @property
    def _factors(self) -> tuple[MomentFactor, MomentFactor]:
        return self.primary.factor, self.harmful.factor

    @cached_property
    def _raw_conditions(self) -> list[dict[Mode, tuple[float, int]]]:
        """κ and rank of the raw rows in both modes, primary first."""
        modes: tuple[Mode, ...] = ("rank-aware", "paper-faithful")
        return [{mode: _condition(factor.factor_RD, mode) for mode in modes} for factor in self._factors]

    @cached_property
    def _raw_losses(self) -> list[float | None]:
        """Losses of the best heads on raw rows, where there are labels."""
        return [task.refit_loss() if task.has_labels else None for task in (self.primary, self.harmful)]

    def closed_form(self, budget: float = 1.0) -> LinearImmunization:
        """The extractor at the limit: κ(H_P) = ``budget``, κ(H_H) = κ*·budget; one generalized eigenproblem.

        Raises:
            ConfigError: a budget outside [1, κ(K_P)].
            SpectrumError: ranges with no common direction.
        """
        started = time.perf_counter()
        pencil = common_pencil(self.primary.factor, self.harmful.factor)
        theta = closed_form_theta(self.primary.factor, pencil, budget)
        self.__dict__.setdefault("pencil", pencil)
        settings = {"budget": budget, "tolerance": pencil.tolerance}
        return LinearImmunization(
            "closed_form", theta, settings, time.perf_counter() - started + self._factor_seconds
        )

    def algorithm1(self, config: DescentConfig | None = None, **options: Any) -> LinearImmunization:
        """Algorithm 1: gradient descent on L + λ_PR_well + λ_HR_ill with K⁻¹ on the input side of each regularizer."""
        return self._descend("algorithm1", config, options)

    def ill_only(self, config: DescentConfig | None = None, **options: Any) -> LinearImmunization:
        """Baseline "R_ill only": L + λ_HR_ill without K⁻¹ and without R_well."""
        return self._descend("ill_only", config, options)

    def opt_kappa(self, config: DescentConfig | None = None, **options: Any) -> LinearImmunization:
        """Baseline "Opt κ": gradient descent on log κ(H_P) − log κ(H_H) itself."""
        return self._descend("opt_kappa", config, options)

    def imma(self, config: DescentConfig | None = None, **options: Any) -> LinearImmunization:
        """Baseline IMMA: ascend the harmful loss that a simulated attacker reaches. Needs labels on both tasks."""
        return self._descend("imma", config, options)

    def _descend(self, method: str, config: DescentConfig | None, options: dict[str, Any]) -> LinearImmunization:
        config = dataclasses.replace(config or DescentConfig(), **options)
        started = time.perf_counter()
        theta = Descent(self.primary, self.harmful, config).run(method)
        return LinearImmunization(method, theta, dataclasses.asdict(config), time.perf_counter() - started)

    def report(self, theta_DD: Tensor, *, losses: bool = True) -> LinearReport:
        """Measure an invertible extractor on both tasks, in both metric modes, against the limit."""
        theta = theta_DD.double()
        modes: dict[Mode, list[tuple[float, int]]] = {"rank-aware": [], "paper-faithful": []}
        for factor, raw in zip(self._factors, self._raw_conditions, strict=True):
            for mode, values in modes.items():
                values += [raw[mode], _condition(factor.factor_RD @ theta, mode)]
        common_p, common_h = common_range_conditions(self.pencil, theta)
        limit = self.limit
        common = (common_h / limit.harmful_common_condition) / (common_p / limit.primary_common_condition)
        lost = [
            (raw, task.refit_loss(theta)) if losses and raw is not None else (None, None)
            for raw, task in zip(self._raw_losses, (self.primary, self.harmful), strict=True)
        ]
        return LinearReport(
            rank_aware=ratio_of_conditions("rank-aware", [modes["rank-aware"]]),
            paper_faithful=ratio_of_conditions("paper-faithful", [modes["paper-faithful"]]),
            common_ratio=common,
            limit_ratio=limit.ratio_limit,
            limit_fraction=common / limit.ratio_limit,
            primary_loss_before=lost[0][0],
            primary_loss=lost[0][1],
            harmful_loss_before=lost[1][0],
            harmful_loss=lost[1][1],
            tolerance=max(f.tolerance for f in self._factors),
        )


def _task(rows: Any, labels: Any, tolerance: float | None) -> LinearTask:
    """A task as given, or built from rows."""
    return rows if isinstance(rows, LinearTask) else LinearTask.of_features(rows, labels, tolerance=tolerance)


def _condition(rows: Tensor, mode: Mode) -> tuple[float, int]:
    return condition(rows, mode, is_moment=False)
