"""The guard at work in a run: when to measure, what to return, and what to say when nothing can be returned."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn
from transformers.utils import logging

from hf_immunize.records import UtilityGuardRecord
from hf_immunize.training.core.average import WeightAverage
from hf_immunize.training.core.guard import HasState, UtilityGuard
from hf_immunize.training.core.watch import Watch

logger = logging.get_logger(__name__)

_HALVINGS = 5
"""Evaluations spent on how far towards the last weights the allowance reaches: to within a thirty-second of the way."""


class HasFactor(Protocol):
    """What the guard makes stronger or weaker."""

    factor: float


class GuardedRun:
    """Binds the guard's decisions to one run.

    Args:
        guard: decides.
        watch: knows the progress of the terms since the last evaluation.
        terms: whose strength follows.
        part: what of the model is kept and given back.
        option: name of the allowance, for messages.
    """

    def __init__(self, guard: UtilityGuard, watch: Watch, terms: HasFactor, part: HasState, option: str):
        self.guard, self._watch, self._terms, self._part, self._option = guard, watch, terms, part, option
        self._initial: dict[str, Tensor] = {}
        if guard.allowed is not None:
            self._initial = self._kept_copy()

    @property
    def on(self) -> bool:
        """Whether there is a base to compare with."""
        return self.guard.base is not None

    def check(self, step: int, points: float, last: int) -> dict[str, float]:
        """One evaluation of the weights that would be returned at ``step`` of ``last``, in points; for the log.

        What is ahead is time to recover in while the rate falls; where it does not, ``last`` is the step itself.
        """
        assert self.guard.base is not None
        progress = self._watch.progress()
        ahead = 1 - step / max(last, 1)
        self._terms.factor = self.guard.observe(step, points, progress, self._terms.factor, self._part, ahead=ahead)
        return {"primary_drop": self.guard.base - points, "strength_factor": self._terms.factor}

    def set_back(self, model: nn.Module, optimizer: Any, average: WeightAverage | None, left: int) -> None:
        """Give the model, and its average, the kept weights where the last evaluation saw a ruin.

        To be called after ``check``, with the weights that train in the model. Nothing is done where no steps are
        ``left``, and with schedule-free optimizers, which keep a second point.
        """
        if not self.guard.set_back or not left or hasattr(getattr(optimizer, "optimizer", optimizer), "train"):
            return
        self._part.load_state_dict(self.guard.best or self._initial, strict=True)
        if average is not None:
            average.restart(model)

    def finish(self, measure: Callable[[str], float]) -> UtilityGuardRecord | None:
        """Load the best weights within the allowance, or those from before; None where a metric that guards nothing
        is no number in the end.

        Where training went on to better terms at a drop that was not allowed, the weights lie on the line from the
        best ones within the allowance (or from before) to the last ones, as far along it as the allowance reaches:
        one image more or fewer then moves the result by a little, not from one evaluation's weights to another's.

        Args:
            measure: the metric, in points, of the weights that the model has now; told what for, ``between`` or
                ``final``. The last one has the last word.
        """
        guard, share = self.guard, 0.0
        later = self._kept_copy() if self._went_on() else None
        if guard.allowed is not None:
            kept = guard.choose(self._part)
            if later is not None:
                share = self._along(guard.best or self._initial, later, measure)
            if not kept and not share:
                self._give_back(guard.why_nothing())
        final = measure("final")
        assert guard.base is not None
        if guard.allowed is not None and not guard.base - final <= guard.allowed:
            self._give_back(f"was not held when the chosen weights were measured again ({final:.2f} points)")
            guard.best_step, share = 0, 0.0
            again = measure("final")
            final = again if math.isfinite(again) else guard.base  # of the same weights, before training
        if not math.isfinite(final):
            logger.warning(f"{guard.metric} of the trained weights is {final}: its drop is not known.")
            return None
        return guard.record(final).model_copy(update={"towards_last": share or None})

    def _went_on(self) -> bool:
        """Whether the last evaluation saw better terms than the kept weights', at a drop beyond the allowance."""
        guard = self.guard
        if guard.allowed is None or not guard.history:
            return False
        last = guard.history[-1]
        return last["drop"] > guard.allowed and last["progress"] < guard.best_progress

    def _along(self, start: Mapping[str, Tensor], end: Mapping[str, Tensor], measure: Callable[[str], float]) -> float:
        """Load the weights farthest from ``start`` towards ``end`` found within the allowance, and tell their share of
        the way.

        Interpolated weights of one run keep what both ends do (Wortsman et al., CVPR 2022, WiSE-FT); here each point
        is measured, so nothing rests on that.
        """
        assert self.guard.base is not None and self.guard.allowed is not None
        held, refused = 0.0, 1.0
        for _ in range(_HALVINGS):
            share = (held + refused) / 2
            self._part.load_state_dict(_between(start, end, share), strict=True)
            within = self.guard.base - measure("between") <= self.guard.allowed
            held, refused = (share, refused) if within else (held, share)
        self._part.load_state_dict(_between(start, end, held) if held else start, strict=True)
        return held

    def _kept_copy(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu().clone() for name, value in self._part.state_dict().items()}

    def _give_back(self, why: str) -> None:
        self._part.load_state_dict(self._initial, strict=True)
        logger.warning(
            f"{self._option} {why}: the weights from before immunization are returned. Lower the strength, add "
            "distillation, or train longer."
        )


def _between(start: Mapping[str, Tensor], end: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Weights and statistics that share of the way; counters are the end's."""
    return {name: start[name] + share * (value - start[name]) if value.is_floating_point() else value
            for name, value in end.items()}
