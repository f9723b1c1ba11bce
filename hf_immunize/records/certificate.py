"""Evidence and what it is worth: the certificate of one immunized model against its base."""

from __future__ import annotations

from typing import Literal

from hf_immunize.records.base import Part, Record
from hf_immunize.records.provenance import DatasetFingerprint, ModelFingerprint, Provenance
from hf_immunize.records.spectrum import SpectrumRecord

VerdictName = Literal["RESISTS", "FAILS", "INCONCLUSIVE", "NOT APPLICABLE", "NOT RUN"]


class Interval(Part):
    """A point estimate with its interval. A null bound is open: censored runs put no figure on it."""

    estimate: float | None
    low: float | None
    high: float | None
    level: float = 0.95
    samples: int
    """Number of paired seeds behind it."""


class Side(Part):
    """One model's results under one attack, at the trial its attacker would choose."""

    trial: str | None
    """Trial with the best attacker-validation result; null when every run diverged."""
    steps_to_threshold: list[int | None]
    """Per seed, on the test split; null = not reached within the budget."""
    accuracy: list[float]
    """Per seed, the accuracy on the test split at the evaluation with the best validation accuracy."""
    trials: int
    """Hyperparameter trials that were run."""
    diverged: int
    """Runs (trial × seed) that diverged. They are failed tries of the attacker, not resistance."""


class Cell(Part):
    """One attack: the immunized model beside its control, and the verdict."""

    attack: str
    family: str
    unit: Literal["step", "solve"]
    budget: int
    threshold: float
    """Harmful test accuracy (0..1) the attacker has to reach and hold."""
    seeds: list[int]
    subject: Side | None
    control: Side | None
    scratch: Side | None = None
    slow_down: Interval
    """Steps of the subject over steps of the control."""
    accuracy_drop: Interval
    """Best accuracy on the control minus best accuracy on the subject (absolute, 0..1)."""
    relative_fine_tuning_deviation: Interval
    """Signed RFD in percent: mean over evaluations of (M_base − M_imm)/M_base (Sarker et al. 2025, signed)."""
    normalized_resistance: Interval | None = None
    """ρ = (T_imm − T_base)/(T_scratch − T_base); null when training from scratch was not run or not reached."""
    verdict: VerdictName
    reason: str


class FamilyVerdict(Part):
    """The verdict on a family of attackers is that of its strongest member."""

    family: str
    verdict: VerdictName
    attacks: list[str]


class Utility(Part):
    """Primary metric of base and immunized model on held-out data, in percent."""

    metric: str
    base: float
    immunized: float
    drop: Interval
    """Base minus immunized, in points; interval for matched proportions over paired test rows."""
    rows: int


class Certificate(Record):
    """What was measured on exactly these weights, and by which rule it was judged."""

    subject: ModelFingerprint
    control: ModelFingerprint
    primary_data: list[DatasetFingerprint]
    harmful_data: list[DatasetFingerprint]
    utility: Utility
    cells: list[Cell]
    families: list[FamilyVerdict]
    overall: VerdictName
    statement: str
    """The plain sentence a reader takes away; it is that of the strongest attacker."""
    rule: str
    """The verdict rule in words, with its constants."""
    threshold_rule: str
    spectra: dict[Literal["base", "immunized"], list[SpectrumRecord]]
    immunization_ratio: float | None
    """RIR_θ0, rank-aware, over whole data splits. It explains; it does not certify."""
    immunization_ratio_parts: dict[Literal["harmful", "primary"], float | None]
    """(i) κ_H(θ_I)/κ_H(θ₀) and (ii) κ_P(θ_I)/κ_P(θ₀)."""
    not_run: list[str]
    """Checklist lines of a full certification that this exam did not cover."""
    traces: dict[str, str]
    """SHA-256 of every trace file behind the cells, by path relative to the certificate."""
    provenance: Provenance
    expires: str
    """ISO date after which the certificate should be renewed: attackers improve."""
    files: dict[str, str] = {}
    """SHA-256 of the other files that loading reads (configuration, processor), by path relative to the certificate."""
