"""Image classification as a task of an exam: primary, harmful and benign classes, as pixels for one processor."""

from __future__ import annotations

from functools import cache
from typing import Any

from hf_immunize.data import SIDES, PixelDataset, Task, TaskArguments, describe_source, refuse_one_task, warn_of_copies
from hf_immunize.errors import DataError
from hf_immunize.records import DatasetFingerprint


class ClassesTask:
    """The sides of TaskArguments, each loaded when it is first asked for.

    Args:
        arguments: sources, classes and splits.
        processor: the image processor of the model that sees the pixels.
    """

    def __init__(self, arguments: TaskArguments, processor: Any):
        self._arguments, self._processor = arguments, processor
        self.source = describe_source(arguments.primary_dataset)
        self._loaded: dict[str, Task] = {}
        self.examples = cache(self._examples)
        self.fingerprint = cache(self._fingerprint)

    @property
    def sides(self) -> tuple[str, ...]:
        """``primary``, ``harmful``, and ``benign`` where there is a benign dataset."""
        return ("primary", "harmful", *(() if self._arguments.benign_dataset is None else ("benign",)))

    @property
    def label_names(self) -> list[str]:
        """The classes that the model keeps."""
        return self.side("primary").label_names

    def side(self, name: str) -> Task:
        """One side as ``hf_immunize.data`` loads it. Raises DataError for one that has no dataset."""
        if name not in SIDES:
            raise DataError(f"expected a side in {self.sides}, got {name!r}.")
        if name not in self._loaded:
            self._loaded[name] = Task(self._arguments, name)
        return self._loaded[name]

    def _examples(self, side: str, split: str) -> PixelDataset:
        return self.side(side).pixels(split, self._processor)

    def _fingerprint(self, side: str, split: str) -> DatasetFingerprint:
        return self.side(side).fingerprint(self.examples(side, split), split)

    def attacker_knows(self, side: str) -> dict[str, Any]:
        """Benign rows, where there are any, to mix with harmful ones."""
        mixed = side == "harmful" and "benign" in self.sides
        return {"benign": self.examples("benign", "attack") if mixed else None}

    def described(self, *sides: str) -> dict[str, Any]:
        """The arguments that decide the rows of these sides, of all by default, each source by its own name."""
        named = {f"{side}_dataset": describe_source(getattr(self._arguments, f"{side}_dataset")) for side in self.sides}
        others = tuple(f"{side}_" for side in SIDES if sides and side not in sides)
        return {name: value for name, value in (self._arguments.described() | named).items()
                if not name.startswith(others)}

    def located(self) -> dict[str, Any]:
        """``described``, and the commit of each Hub dataset that was read: a branch moves, a certificate stays."""
        found = {f"{side}_revision": commit for side, held in self._loaded.items() if (commit := held.commit)}
        return self.described() | found

    def warn_of_copies(self, *sides: str) -> None:
        """Tell which splits of these sides share images, where defender and judge have to be apart."""
        warn_of_copies(*map(self.side, sides))

    def refuse_one_task(self) -> None:
        """Raise DataError where the harmful images are the primary ones, class for class."""
        refuse_one_task(self.side("primary"), self.side("harmful"))
