"""A ridge probe on held-out harmful rows while training, for trackers to draw. It decides nothing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from transformers import TrainerCallback

from hf_immunize.errors import DataError

PROBE_ROWS = 512
"""Rows a probe while training looks at; the verdict at the end takes more."""
PROBE = "harmful_probe"
"""Under which it is logged: accuracy, or R² of harmful rows without classes."""


class Probing(TrainerCallback):
    """Logs what an attacker's ridge probe reaches, before the first step and every ``steps``.

    Args:
        steps: between two looks.
        probe: given a model and how many rows at most, what a probe reaches; None where there is nothing to tell apart.
        model: the bare model.
        judged: inside, the model has the weights that would be returned now.
        log: takes what is to be logged.
    """

    def __init__(
        self, steps: int, probe: Callable[[nn.Module, int], float | None], model: Callable[[], nn.Module],
        judged: Callable[[], AbstractContextManager[Any]], log: Callable[[dict[str, float]], None],
    ):
        self._steps, self._probe, self._model, self._judged, self._log = steps, probe, model, judged, log

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The model before training, unless a run goes on."""
        if state.global_step == 0:
            self._look(control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After every ``steps`` optimizer steps."""
        if state.global_step % self._steps == 0:
            self._look(control)

    def _look(self, control: Any) -> None:
        with self._judged():
            found = self._probe(self._model(), PROBE_ROWS)
        if found is None:
            raise DataError(
                "expected harmful rows with labels of two classes or more for probe_steps, got others: a probe has "
                "nothing to tell apart. Set probe_steps=0, or give the rows their labels."
            )
        due = control.should_log  # which a log takes back
        self._log({PROBE: found})
        control.should_log = due
