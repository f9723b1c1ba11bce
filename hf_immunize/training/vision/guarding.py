"""What the trainer measures, logs and finally returns: the utility guard and the average of the weights."""

from __future__ import annotations

import contextlib
import math
from typing import Any

from torch import Tensor, nn
from transformers.utils import logging

from hf_immunize.errors import ConfigError
from hf_immunize.records import OutcomeRecord
from hf_immunize.training.core.average import WeightAverage
from hf_immunize.training.core.guard import UtilityGuard
from hf_immunize.training.core.meter import Meter
from hf_immunize.training.core.objective import GlobalObjective
from hf_immunize.training.core.watch import Watch
from hf_immunize.training.vision.outcome import OutcomeMeter, logged

logger = logging.get_logger(__name__)


class GuardedMixin:
    """Logging, evaluation with averaged weights, and the guard's decisions; expects the attributes below."""

    args: Any
    state: Any
    model: Any
    accelerator: Any
    guard: UtilityGuard
    meter: Meter
    objective: GlobalObjective
    average: WeightAverage | None
    outcome: OutcomeRecord | None
    _outcome_meter: OutcomeMeter
    _initial: dict[str, Tensor] | None
    watch: Watch

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of what was measured since the last log. A log only tells: see ``Watch`` for what decides.

        A number that is not defined, as log κ of features that have collapsed to a point, is left out.
        """
        if "loss" in logs:
            means = {name: value for name, value in self.meter.drain().items() if math.isfinite(value)}
            logs = {**logs, **means, "strength": self.objective.strength}
        super().log(logs, start_time)  # type: ignore[misc]

    def _metric_points(self, metrics: dict[str, float], prefix: str = "eval") -> float:
        key = f"{prefix}_{self.guard.metric}"
        if key not in metrics:
            raise ConfigError(f"expected metric {self.guard.metric!r} in {sorted(metrics)}: set guard_metric.")
        return 100.0 * metrics[key]

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """An evaluation during training, of the averaged weights where there are such: they are what is returned."""
        bare = self.accelerator.unwrap_model(self.model)
        with self.average.swapped(bare) if self.average else contextlib.nullcontext():
            metrics = super()._evaluate(*args, **kwargs)  # type: ignore[misc]
            if self.guard.base is not None:
                self._guard_step(metrics)
        return metrics

    def _guard_step(self, metrics: dict[str, float]) -> None:
        progress = self.watch.progress()
        bare = self.accelerator.unwrap_model(self.model)
        points = self._metric_points(metrics)
        self.objective.factor = self.guard.observe(
            self.state.global_step, points, progress, self.objective.factor, bare
        )
        assert self.guard.base is not None
        self.log({"primary_drop": self.guard.base - points, "strength_factor": self.objective.factor})

    def _finish(self) -> None:
        """Give the model the weights that are returned, and say whether they are what was asked for."""
        bare = self.accelerator.unwrap_model(self.model)
        self._refuse_ruined()  # type: ignore[attr-defined]
        if self.average:
            self.average.copy_to(bare)
        if self.guard.base is not None:
            self._choose_weights(bare)
        self.outcome = self._outcome_meter.record(bare)
        if self.outcome is not None:
            self.log(logged(self.outcome))
            logger.warning(self.outcome.told)

    def _choose_weights(self, bare: nn.Module) -> None:
        """Load the weights within the allowance, or those of before."""
        if not self.guard.history or self.guard.history[-1]["step"] != self.state.global_step:
            self._guard_step(self.evaluate())  # type: ignore[attr-defined]
        if self.guard.allowed is not None and not self.guard.choose(bare):
            self._return_initial(self.guard.why_nothing())
        final = self._metric_points(self.evaluate(metric_key_prefix="final"), "final")  # type: ignore[attr-defined]
        if self.guard.allowed is not None and not self.guard.base - final <= self.guard.allowed:
            self._return_initial(f"was not held when the chosen weights were measured again ({final:.2f} points)")
            self.guard.best_step = 0
            final = self._metric_points(self.evaluate(metric_key_prefix="final"), "final")  # type: ignore[attr-defined]
        self.guard_record = self.guard.record(final)

    def _return_initial(self, why: str) -> None:
        self.accelerator.unwrap_model(self.model).load_state_dict(self._initial, strict=True)
        logger.warning(
            f"max_primary_drop={self.guard.allowed} {why}: the weights from before immunization are returned. Lower "
            "the strength, add distillation, or train longer."
        )
