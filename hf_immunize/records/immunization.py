"""How an immunized model was made."""

from __future__ import annotations

from typing import Literal

from pydantic import JsonValue

from hf_immunize.records.base import Part, Record
from hf_immunize.records.provenance import DatasetFingerprint, ModelFingerprint, Provenance
from hf_immunize.records.spectrum import SpectrumRecord


class UtilityGuardRecord(Part):
    """What the guard on the primary metric saw and did. All in points of the metric, on the guard's split."""

    metric: str
    base: float
    final: float
    drop: float
    allowed: float | None
    """``max_primary_drop``; null when there was no guard."""
    held: bool | None
    """Whether the returned weights are within the allowance; null when there was no guard."""
    returned_step: int
    """Optimizer step whose weights were returned."""
    history: list[dict[str, float]]
    towards_last: float | None = None
    """How far (0..1) the returned weights lie on the line from those of ``returned_step`` to the last ones; null: they
    are those of the step."""

    @property
    def told_step(self) -> str:
        """In words, which weights were returned."""
        if self.towards_last is None:
            return f"weights of step {self.returned_step}"
        last = int(self.history[-1]["step"])
        return f"weights {100 * self.towards_last:.0f} % of the way from step {self.returned_step} to step {last}"


class OutcomeRecord(Part):
    """Whether immunization did what it was for, on the defender's harmful rows; an exam says more, and may disagree."""

    rows: int
    held_out: bool
    """Whether training has not seen these rows."""
    chance: float | None
    """Share of the most frequent class; 0 for R²; null without a probe."""
    probe_before: float | None
    """What the best of several ridge probes at the head's input reaches before training, fitted on one half of the rows
    and judged on the other: accuracy (0..1), or held-out R² where rows have several labels or numbers. Null where they
    have one class or none."""
    probe_after: float | None
    terms_before: dict[str, float]
    """Harmful terms of the objective, over all rows."""
    terms_after: dict[str, float]
    immunized: bool
    told: str
    """The same in one line."""
    probe_metric: Literal["accuracy", "r2"] | None = "accuracy"
    """Null without a probe."""
    gradient_steps_before: float | None = None
    """Steps of gradient descent at the largest stable rate for half of ``probe_before``'s gain over chance; null
    without a probe."""
    gradient_steps_after: float | None = None
    """The same on the features after training; null where no number of steps gets that far, or without a probe."""
    loss_before: float | None = None
    """Mean denoising loss of a pipeline on these images before training; null for classifiers."""
    loss_after: float | None = None


class ImmunizationRecord(Record):
    """Config used, spectra before and after, data and versions of one immunization run."""

    model: ModelFingerprint
    base: ModelFingerprint
    config: dict[str, JsonValue]
    """Every training argument, paths and tokens left out."""
    fingerprint: str
    """SHA-256 over config, base weights and data: two runs with the same one are the same run."""
    seeds: dict[str, int]
    data: list[DatasetFingerprint]
    spectra: dict[str, list[SpectrumRecord]]
    """``base`` and ``immunized`` → training-split spectra of both tasks."""
    guard: UtilityGuardRecord
    outcome: OutcomeRecord | None = None
    """Null where it could not be measured, and in records of older releases."""
    steps: int
    saved_step: int | None = None
    """The step whose weights were saved; null in records of older releases."""
    seconds: float
    provenance: Provenance
