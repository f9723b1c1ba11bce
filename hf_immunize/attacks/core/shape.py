"""The one shape of every attack: a frozen config, a function over planned runs, a result per run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from hf_immunize.records import DatasetFingerprint, Evaluation, ModelFingerprint, Plugin

Role = Literal["subject", "control", "scratch", "nothing", "alternative"]
"""The side of an exam that a model is: under test, its base, random weights of its architecture, none at all, or
another public model."""
EVALUATION_RATIO = 1.25
"""Consecutive evaluations are about this factor apart: the resolution of every steps-to-threshold."""


@dataclass(frozen=True)
class Run:
    """One planned run: a config (one value per swept field), its trial name, and a seed."""

    config: Any
    trial: str
    seed: int
    tuning: tuple[int, ...] = ()
    """Seeds on which the trials were compared before the best one was run on the others; empty: on all of them."""
    widened: int = 0
    """The how-manieth value beyond the range asked for it tries; 0: one within."""
    proposed: int = 0
    """The how-manieth trial that a search proposed it is; 0: one that was drawn beforehand."""
    bars: tuple[tuple[int, float], ...] = ()
    """Steps, and the validation score below which the run is given up there."""
    follows: bool = True
    """Whether the attack's effort may follow the base, in an exam in which it does."""


@dataclass(frozen=True)
class Result:
    """What a run did; the suite turns it into an ``AttackTrace``."""

    curve: Sequence[Evaluation]
    budget: int
    seconds: float
    outcome: Literal["completed", "diverged", "not_applicable"] = "completed"
    note: str | None = None
    samples: int | None = None
    """Training rows seen within the budget, repetitions counted."""
    flops: float | None = None
    """Estimated floating-point operations within the budget."""
    picture: bytes | None = None
    """What the attacked model draws in the end, as a PNG; for attacks on models that draw."""


class Context(Protocol):
    """What the queue of runs asks of any attack context."""

    @property
    def role(self) -> Role:
        """The side of the exam."""

    @property
    def device(self) -> str:
        """Where runs are made."""

    @property
    def data(self) -> tuple[DatasetFingerprint, ...]:
        """Fingerprints of the attacker's splits."""

    @property
    def fingerprint(self) -> ModelFingerprint:
        """Identity of the attacked weights."""

    @property
    def described(self) -> dict[str, Any]:
        """What a trace says about the exam beside the attack's own settings."""

    def holding(self, need: str) -> str | None:
        """Digest of what the attacker holds under this name; None for nothing."""


@dataclass(frozen=True)
class Attack:
    """An entry of ``ATTACKS``.

    ``run`` is given an attack context and yields one result per planned run, in any order. The fields of ``config`` are
    made by ``setting``.
    """

    config: type[Any]
    run: Callable[[Any, Sequence[Run]], Iterator[tuple[Run, Result]]]
    family: str
    unit: Literal["step", "solve"] = "step"
    needs: tuple[str, ...] = ()
    """What the attacker must hold beside the model and harmful data; written into every trace of the attack."""
    batched: bool = False
    """Whether runs are columns of one tensor program. Their rounding then depends on their company, which large rates
    amplify: when one is missing the suite makes all of them again, so that an interrupted exam ends like any other."""
    own_threshold: bool = False
    """Whether success is a share of what this attack itself reaches on the base: for attackers with hardly any data."""
    covers: str = ""
    """Which defence it undoes, in a few words."""
    refuses: str = ""
    """Which models it cannot be made on, in a few words; empty: none. Its runs on those are ``not_applicable``."""
    plugin: Plugin | None = None
    """Whose it is, where it is not one of this package; set when it is registered."""


def setting(default: Any, told: str, **tried: tuple[Any, ...]) -> Any:
    """A field of an attack's config: its default, its help, and the values that an attacker tries.

    Args:
        tried: ``sweep``, the values of the default grid, and ``search``, those that a random search draws from instead.
    """
    return field(default=default, metadata={"help": told, **tried})


_LACKING = {
    "base": "the attacker of this exam does not hold the base model (hf-immunize attack --base_path, on every side)",
    "benign": "the attacker of this exam holds no benign data (benign_dataset)",
    "prior": "the attacker of this exam holds no conditions of retained concepts (context.prior)",
    "other": "the attacker of this exam holds no other name for the concept (context.other)",
    "placeholder": "the attacker of this exam holds no placeholder for a name (context.placeholder)",
    "generic": "the attacker of this exam holds no generic name (context.generic)",
    "other_images": "the attacker of this exam holds no images from another source (context.other_images)",
}


NEEDS = tuple(_LACKING)
"""What an attacker may hold beside the model and harmful data."""


def lacking(attack_needs: Sequence[str], context: Any) -> str | None:
    """Why an attack with these needs does not apply, or None."""
    return next((_LACKING[need] for need in attack_needs if getattr(context, need) is None), None)


def not_applicable(runs: Sequence[Run], why: str) -> Iterator[tuple[Run, Result]]:
    """Every run as one that does not apply: never resistance."""
    for planned in runs:
        yield planned, Result([], getattr(planned.config, "steps", 1), 0.0, "not_applicable", why)


def evaluation_steps(budget: int, ratio: float = EVALUATION_RATIO) -> list[int]:
    """1 = first step, then steps that grow by ``ratio`` (at least by one), and the budget itself."""
    steps, step = [], 1
    while step < budget:
        steps.append(step)
        step = max(step + 1, round(step * ratio))
    return [*steps, budget]
