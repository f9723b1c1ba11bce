"""The guard at work in a run: when to measure, what to return, and what to say when nothing can be returned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor
from transformers.utils import logging

from hf_immunize.records import UtilityGuardRecord
from hf_immunize.training.core.guard import HasState, UtilityGuard
from hf_immunize.training.core.watch import Watch

logger = logging.get_logger(__name__)


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
            self._initial = {name: value.detach().cpu().clone() for name, value in part.state_dict().items()}

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

    def finish(self, measure: Callable[[], float]) -> UtilityGuardRecord:
        """Load the weights within the allowance, or those from before; ``measure`` has the last word on them."""
        guard = self.guard
        if guard.allowed is not None and not guard.choose(self._part):
            self._give_back(guard.why_nothing())
        final = measure()
        assert guard.base is not None
        if guard.allowed is not None and not guard.base - final <= guard.allowed:
            self._give_back(f"was not held when the chosen weights were measured again ({final:.2f} points)")
            guard.best_step = 0
            final = measure()
        return guard.record(final)

    def _give_back(self, why: str) -> None:
        self._part.load_state_dict(self._initial, strict=True)
        logger.warning(
            f"{self._option} {why}: the weights from before immunization are returned. Lower the strength, add "
            "distillation, or train longer."
        )
