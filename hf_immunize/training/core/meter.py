"""Running means that stay on the device until they are logged, and on to the watch that decides."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_immunize.training.core.watch import Watch


class Meter:
    """Sums detached scalars; ``drain`` reads the means once and starts again.

    Args:
        watch: is told everything but diagnostics.
    """

    def __init__(self, watch: Watch | None = None) -> None:
        self._watch = watch
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor], *, diagnostic: bool = False) -> None:
        """Add one observation of each named scalar; a ``diagnostic`` explains, and may be undefined."""
        if self._watch is not None and not diagnostic:
            self._watch.add(values)
        for name, value in values.items():
            value = value.detach().clone()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def drain(self) -> dict[str, float]:
        """Means since the last drain."""
        means = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means

    def state(self) -> dict[str, Tensor]:
        """Sums and counts since the last drain, as tensors."""
        sums = {f"sum.{name}": torch.as_tensor(value) for name, value in self._sums.items()}
        return sums | {f"count.{name}": torch.tensor(count) for name, count in self._counts.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what ``state`` returned."""
        self._sums = {k.removeprefix("sum."): v for k, v in state.items() if k.startswith("sum.")}
        self._counts = {k.removeprefix("count."): int(v) for k, v in state.items() if k.startswith("count.")}
