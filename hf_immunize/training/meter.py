"""Running means that stay on the device until they are logged."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


class Meter:
    """Sums detached scalars; ``drain`` reads the means once and starts again."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add one observation of each named scalar."""
        for name, value in values.items():
            value = value.detach().clone()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def drain(self) -> dict[str, float]:
        """Means since the last drain."""
        means = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means
