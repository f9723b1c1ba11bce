"""Effort beyond what an exam asks for: larger budgets and trials beyond the range, as the base's runs say."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from hf_immunize.attacks.core.shape import Run
from hf_immunize.exam.presets import grown_name
from hf_immunize.records import AttackTrace


@dataclasses.dataclass(frozen=True)
class Beyond:
    """A trial beyond the range: the one named ``trial`` with one setting replaced."""

    trial: str
    name: str
    field: str
    value: Any
    number: int


@dataclasses.dataclass(frozen=True)
class Proposed:
    """A trial that a search proposes: the first one with these settings, given up where it falls below the bars."""

    name: str
    values: tuple[tuple[str, Any], ...]
    number: int
    bars: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Effort:
    """What is run of one attack instead of what was asked for.

    Args:
        budget: steps of every run; None: those asked for.
        beyond: trials beyond the range.
        proposed: trials that a search proposes.
        follows: whether what the base's runs say may change it; where not, every trace says so.
    """

    budget: int | None = None
    beyond: tuple[Beyond, ...] = ()
    proposed: tuple[Proposed, ...] = ()
    follows: bool = True

    def applied(self, asked: Sequence[Run]) -> list[Run]:
        """The runs asked for with this effort."""
        runs = [dataclasses.replace(with_budget(run, self.budget), follows=self.follows) for run in asked]
        first = [run for run in runs if run.trial == runs[0].trial]
        runs += [_proposed_run(run, one) for one in self.proposed for run in first]
        for one in self.beyond:
            runs += [beyond_range(run, one) for run in runs if run.trial == one.trial]
        return runs


Follow = Callable[[str, Sequence[AttackTrace], Effort], Effort | None]
"""Given an attack, its runs on which trials are compared and their effort: the effort to go on with, or None."""


def with_budget(run: Run, steps: int | None) -> Run:
    """The same run with a larger budget, which its trial's name then tells."""
    if steps is None or run.config.steps == steps:
        return run
    config = dataclasses.replace(run.config, steps=steps)
    return dataclasses.replace(run, config=config, trial=grown_name(run.trial, steps))


def beyond_range(run: Run, one: Beyond) -> Run:
    """The same run with one setting replaced."""
    config = dataclasses.replace(run.config, **{one.field: one.value})
    return dataclasses.replace(run, config=config, trial=one.name, widened=one.number, proposed=0, bars=())


def _proposed_run(run: Run, one: Proposed) -> Run:
    config = dataclasses.replace(run.config, **dict(one.values))
    return dataclasses.replace(run, config=config, trial=one.name, proposed=one.number, bars=one.bars)
