"""What the guard and the divergence check go by: what each step measured, whatever was logged and however often."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hf_immunize.errors import DecompositionError, TrainingDivergedError
from hf_immunize.training.core.registry import AnyTerm

_LONGEST = 50
"""Steps that may pass before values on an accelerator are read."""


class Watch:
    """Keeps the scalars of every step on the device until somebody needs them, and reads all of them at once.

    Diagnostics do not belong here: log κ of features that have collapsed is undefined, and collapse is the goal.

    Args:
        terms: whose means since the last evaluation are the progress.
    """

    def __init__(self, terms: Iterable[AnyTerm]):
        self._terms = {term.name: term for term in terms}
        self._waiting: list[tuple[int, tuple[str, ...], Tensor]] = []
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self.step = 0
        """The optimizer step that is being taken, counted from 1."""

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Take detached scalars of the current step; nothing is read."""
        self._waiting += [(self.step, (name,), value.detach().reshape(1)) for name, value in values.items()]

    def add_each(self, names: Sequence[str], values: Tensor) -> None:
        """Take as many scalars of the current step as there are names, in one vector; nothing is read."""
        self._waiting.append((self.step, tuple(names), values.detach()))

    @property
    def is_due(self) -> bool:
        """Whether values should be read now: at once where reading costs nothing, else every few steps."""
        if not self._waiting:
            return False
        first, _, value = self._waiting[0]
        return value.device.type == "cpu" or self.step - first >= _LONGEST

    def settle(self) -> None:
        """Read what is waiting.

        Raises:
            TrainingDivergedError: a value that is not finite; the first step with one is named.
        """
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        broken: dict[int, list[str]] = {}
        for (step, names, _), found in zip(waiting, read_together([value for *_, value in waiting]), strict=True):
            for name, number in zip(names, found, strict=True):
                if not math.isfinite(number):
                    broken.setdefault(step, []).append(name)
                elif name in self._terms:
                    self._sums[name] = self._sums.get(name, 0.0) + number
                    self._counts[name] = self._counts.get(name, 0) + 1
        if broken:
            first = min(broken)
            raise TrainingDivergedError(
                f"expected finite losses and spectra, got {sorted(set(broken[first]))} at step {first}: lower the "
                "learning rate or the strength, and check the images for constant or broken ones. Nothing was saved."
            )

    @contextmanager
    def over_steps(self) -> Iterator[None]:
        """Around the steps of a run: a decomposition that fails is a step that diverged.

        Raises:
            TrainingDivergedError: the step is named, with the values that had stopped being finite before it if any.
        """
        try:
            yield
        except DecompositionError as error:
            self.settle()
            raise TrainingDivergedError(
                f"expected finite losses and spectra, got features without a spectrum at step {self.step} ({error}): "
                "lower the learning rate or the strength. Nothing was saved."
            ) from error

    def progress(self) -> float:
        """Sum over terms of their mean since the last call, each on its own scale; lower is better. Infinity for
        none."""
        self.settle()
        means = [term.progress(self._sums[n] / self._counts[n]) for n, term in self._terms.items() if n in self._sums]
        self._sums, self._counts = {}, {}
        return sum(means) if means else math.inf

    def state(self) -> dict[str, dict[str, float]]:
        """Plain values that a resumed run needs."""
        self.settle()
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def load_state(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Take back what ``state`` returned."""
        self._sums = dict(state["sums"])
        self._counts = {name: int(count) for name, count in state["counts"].items()}


def read_together(vectors: Sequence[Tensor]) -> list[list[float]]:
    """Numbers of several vectors, by one wait for each device that holds some."""
    found: list[list[float]] = [[] for _ in vectors]
    for device in {vector.device for vector in vectors}:
        places = [place for place, vector in enumerate(vectors) if vector.device == device]
        together = torch.cat([vectors[place].to(_widest(device)) for place in places]).tolist()
        for place in places:
            found[place], together = together[: len(vectors[place])], together[len(vectors[place]) :]
    return found


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
