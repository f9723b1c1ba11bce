"""The harmful rows of a run: what they are labelled with, which terms that allows, and which rows a step may draw."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.utils import logging

from hf_immunize.data import (
    Targets,
    as_mapping,
    check_classes,
    check_label_range,
    check_source,
    find_labels,
    first_row,
    is_stream,
    label_key,
    label_names_of,
    targets_of,
    unlabelled,
    whole_number,
)
from hf_immunize.errors import DataError
from hf_immunize.training.core.registry import AnyTerm
from hf_immunize.training.core.terms import IMMA
from hf_immunize.training.core.weight_terms import WeightTerm
from hf_immunize.training.vision.counting import count_labels

logger = logging.get_logger(__name__)

Asks = Literal["classes", "numbers", "image"]
"""What a simulated attacker's head is to answer."""


class HarmfulTask:
    """Harmful rows with class labels, several labels, numbers or none.

    Labels are known at once where they can be had without reading rows (``find_labels``); else a few rows are read
    now, and all of them once, by ``count``, before the first step.

    Args:
        rows: the dataset, with numbered rows or a stream.
        name: ``harmful_dataset`` or ``harmful_eval_dataset``.
        terms: the objective's; those that tell classes apart need class labels.

    Raises:
        DataError: rows that cannot be read, labels that are none, or labels that the terms cannot do with.
    """

    def __init__(self, rows: Any, name: str, terms: Sequence[AnyTerm] = ()):
        check_source(rows, name)
        self.rows, self.name, self.is_stream = rows, name, is_stream(rows)
        self.first: Mapping[str, Any] = first_row(rows, name)
        self.names = label_names_of(rows)
        self.targets: Targets | None = None
        """Labels of every row; None while they are not known, and for a stream."""
        self.made = False
        """Whether a transform makes the labels, which were compared with a column's in a few rows only."""
        self._telling = [t.name for t in terms if t.tells_classes_apart]
        attacking = [t for t in terms if isinstance(t, WeightTerm) and t.sees_rows]
        self._counting = [t.name for t in terms if t is IMMA or t in attacking]
        if self.is_stream:
            self.key = label_key(self.first)
            self._start_stream()
            return
        found = find_labels(rows, name)
        self.key, self.made = found.key, found.made
        if found.key is None:
            self._take(unlabelled(len(rows)))
        elif found.values is not None:
            self._take(targets_of(found.values, name))
        else:
            sampled = targets_of(found.sampled, name)
            self.kind = sampled.kind
            if sampled.kind != "classes":
                self._check(sampled)

    def _start_stream(self) -> None:
        held = unlabelled(2) if self.key is None else targets_of([self.first[self.key]], self.name)
        self.kind = held.kind
        if held.kind != "classes":
            self._check(held)
        elif self.names is None and self._counting:
            raise DataError(
                f"expected a stream that says how many classes it has as {self.name} for {', '.join(self._counting)}, "
                "whose attacker has an output for each, got none: give its label column the feature "
                "datasets.ClassLabel (cast_column)."
            )
        logger.warning(
            f"{self.name} is a stream: batches are taken as they come, since rows of a class cannot be looked for. "
            "Shuffle it (stream.shuffle(seed=0, buffer_size=...)) if its rows are in the order of their classes."
        )

    def count(self, *, workers: int = 0) -> None:
        """Read the label of every row, once, where they are not known; called by every process of a run.

        Raises:
            DataError: a row that cannot be read, or labels that cannot be used.
        """
        if self.targets is None and not self.is_stream:
            assert self.key is not None
            self._take(count_labels(self.rows, self.key, self.name, workers=workers))

    def _take(self, targets: Targets) -> None:
        self.kind = targets.kind
        self._check(targets)
        self.targets = targets

    def _check(self, targets: Targets) -> None:
        telling = self._telling
        if targets.kind == "unlabelled" and (telling or len(targets) < 2):
            wanted = f"for {', '.join(telling)}, which tells classes apart" if telling else "or at least two rows"
            raise DataError(
                f"expected a 'labels' column in {self.name}, {wanted}, got {len(targets)} rows with "
                f"{sorted(map(str, self.first))}: rename the label column to 'labels', or choose an objective that "
                "needs no classes, such as condition_number, and bring more images."
            )
        if targets.kind != "classes":
            if telling:
                raise DataError(
                    f"expected one class for each row of {self.name} for {', '.join(telling)}, which tells classes "
                    f"apart, got {targets.told}: choose an objective that does not, such as condition_number."
                )
            return
        labels = targets.values.tolist()
        classes = len(self.names) if self.names else max(labels) + 1
        if targets.tells_apart > 1:
            check_label_range(labels, classes, self.name)
            check_classes(labels, self.names or range(classes), self.name)
        elif labels[0] < 0 or labels[0] >= classes:
            raise DataError(f"expected labels in 0..{classes - 1} in {self.name}, got {labels[0]} in row 0.")
        elif telling:
            raise DataError(
                f"expected at least two classes in {self.name} for {', '.join(telling)}, which tells them apart, got "
                "1: choose an objective that does not, such as condition_number, or give the task its classes."
            )

    @property
    def classes(self) -> int | None:
        """Number of classes of the attacker's task; None where rows have no class, or it is not known yet."""
        if self.kind != "classes":
            return None
        if self.names is not None:
            return len(self.names)
        return None if self.targets is None else int(self.targets.values.max()) + 1

    @property
    def asks(self) -> Asks:
        """What a simulated attacker learns of a row: its class, its numbers, or, where nothing tells rows apart, the
        image itself at a few pixels, which is what features have to keep for any task to be learned from them."""
        if self.kind in ("multi-label", "regression"):
            return "numbers"
        if self.kind == "classes" and (self.targets is None or self.targets.tells_apart > 1):
            return "classes"
        return "image"

    @property
    def labels(self) -> Tensor:
        """Class of every row, zeros where rows have none; counted now if nobody did before."""
        self.count()
        assert self.targets is not None
        whole = self.targets.values
        return whole if self.kind == "classes" else torch.zeros(len(whole), dtype=torch.long)

    @property
    def every_label(self) -> Tensor:
        """Labels of every row as they are, zeros where there are none."""
        self.count()
        assert self.targets is not None
        return self.targets.values

    def replaced(self, rows: Any) -> HarmfulTask:
        """The same task with other rows in the place of its own, as many: cached activations, for instance."""
        other = copy.copy(self)
        other.rows, other.made = rows, False
        other.key = label_key(first_row(rows, self.name))
        return other

    def check_row(self, row: Any, number: int, name: str) -> None:
        """Raise DataError where a transform made another label than the column, by which rows are drawn, says.

        Of a stream, where a class is none of those it names.
        """
        if self.is_stream and self.kind == "classes":
            label = whole_number(as_mapping(row, number, name)[str(self.key)], number, name)
            if label < 0 or (self.names is not None and label >= len(self.names)):
                raise DataError(f"expected labels of the classes of {name}, got {label} in row {number}: fix it.")
        if not self.made or self.targets is None or self.key is None:
            return
        wanted, found = self.targets.values[number], torch.as_tensor(row[self.key])
        if not torch.equal(wanted.double(), found.double()):
            raise DataError(
                f"expected label {wanted.tolist()} in row {number} of {name}, as its column says, got "
                f"{found.tolist()} from its transform: put the labels that are meant into the column "
                "(dataset.map), or give the dataset a tensor 'labels' of its own."
            )


class WithoutTargets:
    """A collator of harmful rows whose labels are no classes: every row has class 0, which no term looks at."""

    def __init__(self, collate: Any):
        self._collate = collate

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        """One batch."""
        plain = [{name: value for name, value in row.items() if name != "label"} for row in rows]
        return self._collate([row | {"labels": torch.tensor(0)} for row in plain])
