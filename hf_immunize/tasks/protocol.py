"""The one shape of every task: rows by side and split, their fingerprints, and what an attacker holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from hf_immunize.records import DatasetFingerprint

ATTACKER_SPLITS = ("attack", "validation", "test")
"""Splits of a concept that belong to its attacker, in the order of a trace's data; ``defense`` is not among them."""


@runtime_checkable
class ExamTask(Protocol):
    """Sides of an exam: what is kept first, then ``harmful``, then ``benign`` where there is one."""

    source: str
    """Where the rows come from, without local paths."""
    @property
    def label_names(self) -> list[str]:
        """The classes that the model keeps, or every concept."""

    @property
    def sides(self) -> tuple[str, ...]:
        """The names of the sides."""

    def examples(self, side: str, split: str) -> Any:
        """Rows of one split, ready for the model. Raises DataError for a side or split that is not there."""

    def fingerprint(self, side: str, split: str) -> DatasetFingerprint:
        """Identity by content of these rows."""

    def attacker_knows(self, side: str) -> dict[str, Any]:
        """What an attacker with this side's images holds beside them, by the names of the attack context."""

    def described(self, *sides: str) -> dict[str, Any]:
        """The options that decide the rows of these sides, of all by default, without local paths."""


def attacker_fingerprints(task: ExamTask, side: str) -> tuple[DatasetFingerprint, ...]:
    """Fingerprints of the three splits of a side's attacker."""
    return tuple(task.fingerprint(side, split) for split in ATTACKER_SPLITS)


def attacker_holds(task: ExamTask, side: str) -> Mapping[str, Any]:
    """Everything an attack context takes from a task: the three splits, their fingerprints, and what goes with them."""
    rows = {split: task.examples(side, split) for split in ATTACKER_SPLITS}
    return rows | {"data": attacker_fingerprints(task, side)} | task.attacker_knows(side)
