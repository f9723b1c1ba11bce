"""The utility guard: holds the drop of the primary metric by adapting the strength, and keeps the last good weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_immunize.records import UtilityGuardRecord

_RECOVERS = 0.75
"""A drop that has shrunk to less than this share since the last evaluation is recovering."""
_AHEAD = 3.0
"""How many more allowances a drop may take up while the whole run is still ahead: it recovers while the rate falls. On
MobileNetV2 drops of 2.2 points at a third of the run were gains of 0.2 at its end (allowance 1.0)."""
_RUINED = 10.0
"""Allowances beyond which a drop is a ruin: a MobileNetV2 lost 10 to 56 of 58 points in its first four steps."""
_APART = 0.05
"""Share of the whole way within which progress is equal. On small digits, 40 steps: batches had the term at 0.000 at
step 24 and at 0.001 at step 40, held-out rows at 0.057 and 0.022."""


class HasState(Protocol):
    """A model, or the part of one that changes."""

    def state_dict(self) -> Mapping[str, Tensor]:
        """Tensors by name."""

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True) -> object:
        """Take them back."""


class UtilityGuard:
    """Adapts the strength factor at each evaluation and remembers the best weights within the allowance.

    Above the allowance the factor is halved, unless the drop has shrunk by a quarter since the last evaluation: it
    takes steps to recover, and a factor that is halved meanwhile ends at nothing. For the same reason this allowance is
    ``1 + 3·ahead`` times as wide, ``ahead`` the share of the run that is still to come, for as long as the terms go on
    falling: a drop that buys nothing more is not waited for. A drop of more than ten allowances is a ruin: the model is
    to be set back to the kept weights (``set_back``), and the factor is a quarter. Below half of the allowance itself
    the factor grows by a quarter, up to ``max_factor``. Of the evaluations within the allowance the one with the most
    progress on the terms is kept, of equal ones the latest; the model before immunization counts as one of them, so
    there is always something to return. Progress is of batches that are trained on, a few of them near the end of a
    short run, and two ends that lie within a twentieth of the whole way are told apart by chance: they are equal here,
    and the one that trained longer is kept.

    Args:
        allowed: largest drop in points of the metric; None watches and reports only.
        metric: name of the metric.
        max_factor: ceiling of the strength factor.
    """

    def __init__(self, allowed: float | None, metric: str, max_factor: float):
        self.allowed, self.metric, self.max_factor = allowed, metric, max_factor
        self.base: float | None = None
        self.best_step = 0
        self.best_progress = float("inf")
        self.best: dict[str, Tensor] | None = None
        self.history: list[dict[str, float]] = []

    def observe(
        self, step: int, metric: float, progress: float, factor: float, model: HasState, ahead: float = 0.0
    ) -> float:
        """Take one evaluation (metric in points, progress: lower is better) and return the new strength factor.

        ``ahead`` is the share of the run that is still to come (0..1).
        """
        assert self.base is not None, "the base metric is measured before training"
        if step == 0:  # eval_on_start: θ₀ once more
            return factor
        drop = self.base - metric
        before = self.history[-1]["drop"] if self.history else float("-inf")
        buys = self._buys(progress)
        self.history.append({"step": step, "metric": metric, "drop": drop, "progress": progress, "factor": factor})
        if self.allowed is None:
            return factor
        if self.set_back:
            return factor / 4
        if not drop <= self.allowed:  # a metric that is not a number holds nothing
            waited_for = buys and drop <= self.allowed * (1 + _AHEAD * ahead)
            return factor if waited_for or drop < _RECOVERS * before else factor / 2
        if _finite(progress) and progress <= self.best_progress + self._told_apart():
            self.best_step, self.best_progress = step, min(progress, self.best_progress)
            self.best = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
        return min(factor * 1.25, self.max_factor) if drop <= self.allowed / 2 else factor

    @property
    def set_back(self) -> bool:
        """Whether the last evaluation saw a ruin, from which the kept weights are the way back."""
        return bool(self.history) and self._is_ruin(self.history[-1])

    def _is_ruin(self, row: Mapping[str, float]) -> bool:
        return self.allowed is not None and row["drop"] > _RUINED * self.allowed

    def _buys(self, progress: float) -> bool:
        """Whether the terms are lower than at every evaluation before, by more than chance."""
        seen = self._seen()
        return not seen or (_finite(progress) and progress < min(seen) - self._told_apart())

    def _told_apart(self) -> float:
        """How far apart two evaluations' progress has to be: a share of the way between the least and the most."""
        seen = self._seen()
        return _APART * (max(seen) - min(seen)) if seen else 0.0

    def _seen(self) -> list[float]:
        """Progress so far; not of ruins, whose terms are low because nothing is left."""
        return [row["progress"] for row in self.history if _finite(row["progress"]) and not self._is_ruin(row)]

    def choose(self, model: HasState) -> bool:
        """Load the kept weights into the model; False when only the weights before immunization were good enough."""
        if self.allowed is None or self.best is None:
            return False
        model.load_state_dict(self.best, strict=True)
        return self.best_step > 0

    def why_nothing(self) -> str:
        """In words, why no evaluation's weights are returned."""
        drops = [row["drop"] for row in self.history]
        if not drops:
            return "was never checked: there was no evaluation"
        if min(drops) <= (self.allowed or 0.0):
            return "was held, but the terms were not measured before an evaluation"
        return f"was held at none of {len(drops)} evaluations (smallest drop {min(drops):.2f} points)"

    def record(self, final: float) -> UtilityGuardRecord:
        """What was seen and done. ``final`` is the metric of the returned weights."""
        assert self.base is not None
        last = int(self.history[-1]["step"]) if self.history else 0
        return UtilityGuardRecord(
            metric=self.metric,
            base=self.base,
            final=final,
            drop=self.base - final,
            allowed=self.allowed,
            held=None if self.allowed is None else self.base - final <= self.allowed,
            returned_step=last if self.allowed is None else self.best_step,
            history=[{key: value for key, value in row.items() if _finite(value)} for row in self.history],
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values a resumed run needs."""
        plain = {
            "base": self.base,
            "best_step": self.best_step,
            "best_progress": self.best_progress if _finite(self.best_progress) else None,
            "history": [{k: v if _finite(v) else None for k, v in row.items()} for row in self.history],
        }
        return dict(self.best or {}), plain

    def load_state(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Take back what ``state`` returned."""
        self.base, self.best_step = plain["base"], plain["best_step"]
        progress = plain["best_progress"]
        self.best_progress = float("inf") if progress is None else progress
        rows = plain["history"]
        self.history = [{k: float("inf") if v is None else v for k, v in row.items()} for row in rows]
        self.best = dict(tensors) or None


def _finite(value: float) -> bool:
    return bool(torch.isfinite(torch.tensor(value)))
