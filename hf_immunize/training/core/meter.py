"""Running means that stay on the device until they are logged, and on to the watch that decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_immunize.training.core.distributed import average_over_ranks
from hf_immunize.training.core.watch import Watch, read_together


class Meter:
    """Sums detached scalars; ``drain`` reads the means once and starts again.

    Args:
        watch: is told everything but diagnostics.
    """

    def __init__(self, watch: Watch | None = None) -> None:
        self._watch = watch
        self._sums: dict[tuple[str, ...], Tensor] = {}
        """One vector for all names that were added together."""
        self._counts: dict[tuple[str, ...], int] = {}
        self._loaded: dict[str, tuple[Tensor, int]] = {}
        """Sums and counts from a checkpoint, by name, until their vector is added to."""
        self._local: list[tuple[str, Tensor]] = []

    def add(self, values: Mapping[str, Tensor], *, diagnostic: bool = False, local: bool = False) -> None:
        """Add one observation of each named scalar.

        Args:
            diagnostic: it explains, and may be undefined.
            local: it is this rank's own. What is meant is its mean over ranks, taken of all such scalars of a step by
                one call, at ``end_step``; all ranks have to add the same names in the same order.
        """
        if local:
            self._local += [(name, value.detach()) for name, value in values.items()]
            return
        for name, value in values.items():
            self.add_each([name], value.reshape(1), diagnostic=diagnostic)

    def add_each(self, names: Sequence[str], values: Tensor, *, diagnostic: bool = False) -> None:
        """Add one observation of each named scalar, all in one vector."""
        key, values = tuple(names), values.detach()
        if self._watch is not None and not diagnostic:
            self._watch.add_each(key, values)
        if key not in self._sums:
            self._go_on(key, values)
        self._sums[key] = self._sums[key] + values if key in self._sums else values.clone()
        self._counts[key] = self._counts.get(key, 0) + 1

    def _go_on(self, key: tuple[str, ...], like: Tensor) -> None:
        """Add on to what a checkpoint held, in the order in which a run without a break adds up."""
        counts = {self._loaded[name][1] for name in key if name in self._loaded}
        if len(counts) == 1 and all(name in self._loaded for name in key):
            self._sums[key] = torch.stack([self._loaded.pop(name)[0].reshape(()) for name in key]).to(like.device)
            self._counts[key] = counts.pop()

    def end_step(self) -> None:
        """Take the means over ranks of this step's local scalars; every rank has to call it when any does."""
        waiting, self._local = self._local, []
        if waiting:
            together = torch.stack([value.reshape(()).double() for _, value in waiting])
            average_over_ranks([together])
            for (name, _), value in zip(waiting, together, strict=True):
                self.add_each([name], value[None])

    def drain(self) -> dict[str, float]:
        """Means since the last drain."""
        self.end_step()
        vectors = [*((names, total, self._counts[names]) for names, total in self._sums.items()),
                   *(((name,), total.reshape(1), count) for name, (total, count) in self._loaded.items())]
        sums: dict[str, tuple[float, int]] = {}
        for (names, _, count), found in zip(vectors, read_together([total for _, total, _ in vectors]), strict=True):
            for name, number in zip(names, found, strict=True):
                before, times = sums.get(name, (0.0, 0))
                sums[name] = before + number, times + count
        self._sums, self._counts, self._loaded = {}, {}, {}
        return {name: total / count for name, (total, count) in sums.items()}

    def _by_name(self) -> dict[str, tuple[Tensor, int]]:
        kept = dict(self._loaded)
        for names, total in self._sums.items():
            for name, value in zip(names, total, strict=True):
                before, count = kept.get(name, (torch.zeros_like(value), 0))
                kept[name] = before.reshape(()).to(value) + value, count + self._counts[names]
        return kept

    def state(self) -> dict[str, Tensor]:
        """Sums and counts since the last drain, as tensors."""
        self.end_step()
        kept = self._by_name()
        sums = {f"sum.{name}": total for name, (total, _) in kept.items()}
        return sums | {f"count.{name}": torch.tensor(count) for name, (_, count) in kept.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what ``state`` returned."""
        names = [name.removeprefix("sum.") for name in state if name.startswith("sum.")]
        self._sums, self._counts = {}, {}
        self._loaded = {name: (state[f"sum.{name}"], int(state[f"count.{name}"])) for name in names}
