"""Stops a run that a search proposed and that is worse than the runs before it, as the bars of its plan say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from hf_immunize.records import Evaluation


class Pruner(TrainerCallback):
    """Watches a learning curve that another callback, which comes before it, draws.

    Args:
        curve: that curve, as it grows.
        bars: steps of the whole budget, and the validation score below which the best so far is hopeless there.
        before: steps of the budget that were spent before the curve begins.
    """

    def __init__(self, curve: Sequence[Evaluation], bars: Sequence[tuple[int, float]], before: int = 0):
        self._curve, self._bars, self._before = curve, dict(bars), before
        self.note: str | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Give up where the best score so far is below the bar of this step."""
        step = state.global_step + self._before
        bar = self._bars.get(step)
        if bar is not None and self._curve and max(point.validation for point in self._curve) < bar:
            self.note = f"pruned at step {step}: below {bar:.3f}, the median of the runs before"
            control.should_training_stop = True
        return control
