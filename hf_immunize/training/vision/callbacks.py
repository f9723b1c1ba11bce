"""What has to happen after every optimizer step, and after the last one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import TrainerCallback

from hf_immunize.training.core.average import WeightAverage
from hf_immunize.training.core.meter import Meter
from hf_immunize.training.core.watch import Watch


class Averaging(TrainerCallback):
    """Takes each optimizer step's weights into the moving average."""

    def __init__(self, average: WeightAverage, bare: Callable[[], nn.Module]):
        self._average, self._bare = average, bare

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After ``optimizer.step()``."""
        self._average.update(self._bare())


class Watching(TrainerCallback):
    """Stops a run whose numbers are not finite, however rarely it logs."""

    def __init__(self, watch: Watch, meter: Meter):
        self._watch, self._meter = watch, meter

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After every optimizer step; values are read when that costs nothing, or has waited long enough."""
        self._meter.end_step()
        if self._watch.is_due:
            self._watch.settle()


class Ending(TrainerCallback):
    """Chooses and judges the weights while trackers still listen: theirs comes after this one, and closes their files.

    TensorBoard's would open a second file for what is logged later, of the same name within one second.
    """

    def __init__(self, finish: Callable[[], None]):
        self._finish = finish

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before any other callback."""
        self._finish()
