"""The one shape of every attack: a frozen config, a function over planned runs, a result per run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hf_immunize.attacks.context import AttackContext
from hf_immunize.records import Evaluation

EVALUATION_RATIO = 1.25
"""Consecutive evaluations are about this factor apart: the resolution of every steps-to-threshold."""


@dataclass(frozen=True)
class Run:
    """One planned run: a config (one value per swept field), its trial name, and a seed."""

    config: Any
    trial: str
    seed: int


@dataclass(frozen=True)
class Result:
    """What a run did; the suite turns it into an ``AttackTrace``."""

    curve: Sequence[Evaluation]
    budget: int
    seconds: float
    outcome: Literal["completed", "diverged", "not_applicable"] = "completed"
    note: str | None = None


@dataclass(frozen=True)
class Attack:
    """An entry of ``ATTACKS``.

    ``run`` yields one result per planned run, in any order. The fields of ``config`` carry their help in
    ``metadata["help"]`` and, where the attacker tunes them, the values of the default sweep in ``metadata["sweep"]``.
    """

    config: type
    run: Callable[[AttackContext, Sequence[Run]], Iterator[tuple[Run, Result]]]
    family: str
    unit: Literal["step", "solve"] = "step"


def evaluation_steps(budget: int, ratio: float = EVALUATION_RATIO) -> list[int]:
    """1 = first step, then steps that grow by ``ratio`` (at least by one), and the budget itself."""
    steps, step = [], 1
    while step < budget:
        steps.append(step)
        step = max(step + 1, round(step * ratio))
    return [*steps, budget]
