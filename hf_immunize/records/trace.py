"""What one attack run did: its learning curve, on which weights, with which settings."""

from __future__ import annotations

from typing import Literal

from pydantic import JsonValue, model_validator

from hf_immunize.records.base import Part, Record
from hf_immunize.records.provenance import DatasetFingerprint, ModelFingerprint, Provenance

Outcome = Literal["completed", "diverged", "not_applicable"]


class Evaluation(Part):
    """Harmful metric (accuracy, 0..1) at one point of the attack, on the attacker's two held-out splits."""

    step: int
    validation: float
    test: float


class AttackTrace(Record):
    """One run: one attack, one hyperparameter trial, one seed, one model."""

    attack: str
    """Key of ``hf_immunize.attacks.ATTACKS``."""
    family: str
    """Attacker family the verdicts are grouped by, e.g. ``linear probing``, ``whitened probing``, ``LoRA``."""
    trial: str
    """Short name of the hyperparameters that were swept, unique within the attack, e.g. ``learning_rate=0.01``."""
    config: dict[str, JsonValue]
    """Every hyperparameter of the run, swept or not."""
    seed: int
    role: Literal["subject", "control", "scratch", "nothing", "alternative"]
    """Which side of the exam the attacked model was: the model under test, its base, random weights of its
    architecture, no model at all, or another public model that the examiner names."""
    model: ModelFingerprint
    data: list[DatasetFingerprint]
    unit: Literal["step", "solve"]
    """``step``: an optimizer step; ``solve``: a closed-form solution, which has no curve."""
    budget: int
    """Steps the attacker was allowed."""
    curve: list[Evaluation]
    outcome: Outcome
    note: str | None = None
    """Why it diverged or does not apply; for a completed run, what it found on the way, or null."""
    seconds: float
    samples: int | None = None
    """Training rows seen within the budget, repetitions counted; null where nothing was trained."""
    flops: float | None = None
    """Estimated floating-point operations within the budget; null where nothing was trained."""
    provenance: Provenance

    @model_validator(mode="after")
    def _curve_fits_outcome(self) -> AttackTrace:
        if self.outcome == "completed" and not self.curve:
            raise ValueError("a completed run has at least one evaluation")
        steps = [point.step for point in self.curve]
        if steps != sorted(set(steps)) or (steps and steps[-1] > self.budget):
            raise ValueError("evaluation steps must rise and stay within the budget")
        if self.outcome != "completed" and not self.note:
            raise ValueError("a run that did not complete says why in 'note'")
        return self

    @property
    def file_name(self) -> str:
        """File name of this run, unique within a role's trace folder."""
        safe = "".join(letter if letter.isalnum() or letter in "=.,-" else "_" for letter in self.trial)
        return f"{self.attack}__{safe}__seed{self.seed}.json"
