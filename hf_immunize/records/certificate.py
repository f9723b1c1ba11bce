"""Evidence and what it is worth: the certificate of one immunized model against its base."""

from __future__ import annotations

from typing import Literal

from pydantic import JsonValue, model_validator

from hf_immunize.records.base import Interval, Part, Record
from hf_immunize.records.generation import FrechetGap, SimilarityGap
from hf_immunize.records.notebook import certificate_html
from hf_immunize.records.plan import Plan
from hf_immunize.records.provenance import DatasetFingerprint, ModelFingerprint, Provenance
from hf_immunize.records.rule import Rule
from hf_immunize.records.spectrum import SpectrumRecord

VerdictName = Literal["RESISTS", "FAILS", "INCONCLUSIVE", "NOT APPLICABLE", "NOT RUN", "NOTHING TO PROTECT"]


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
    final: list[float] = []
    """Per seed, the accuracy on the test split at the end of the budget."""
    area: list[float] = []
    """Per seed, the mean accuracy over the budget on a log scale of steps, nothing before the first evaluation."""
    best_of_trials: list[float] = []
    """Entry k−1: accuracy to expect of an attacker who tries k random trials of the grid and keeps the best one."""


class AtThreshold(Part):
    """What a cell looks like at another threshold, each side at the trial that is best for it."""

    threshold: float
    subject: list[int | None]
    control: list[int | None]
    slow_down: Interval


class AtBudget(Part):
    """What a cell's verdict would be on a part of its budget, trials being chosen within that part."""

    share: float
    budget: int
    slow_down: Interval
    verdict: VerdictName
    uplift_left: Interval | None = None
    """Share of the base's uplift on that part of the budget that is left; null without runs on both sides."""


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
    """ρ = log(T_imm/T_base)/log(T_scratch/T_base); null when training from scratch was not run or not reached. By
    the first version of the rule without the logarithms."""
    worst_seed_slow_down: float | None = None
    """Smallest slow-down of any seed at its best trial, over the base's median; a seed that did not reach the threshold
    counts with what its budget bounds."""
    open_seeds: int | None = None
    """Seeds that are slowed by less than the rule's factor at their best trial."""
    without_model: float | None = None
    """Harmful test score that an attacker reaches without the model, the best of the references that were run."""
    uplift: Interval | None = None
    """What the base gives beyond that under this attack (absolute, mean over seeds)."""
    uplift_left: Interval | None = None
    """Share of that uplift that this model still gives: 1 = all of it, 0 = an attacker without it is as far."""
    cost: float | None = None
    """Training rows, steps × batch, of the attack on this model up to the threshold or the end of its budget."""
    thresholds: list[AtThreshold] = []
    budgets: list[AtBudget] = []
    samples: int | None = None
    """Training rows the attacker was allowed in one run, repetitions counted: the most of any trial."""
    flops: float | None = None
    """Estimated floating-point operations of one run: the most of any trial."""
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


class Trainability(Part):
    """Whether a benign third task can still be learned from the immunized model as from its base, by one method."""

    attack: str
    """Key of ``hf_immunize.attacks.TRAINABILITY``."""
    unit: Literal["step", "solve"] = "step"
    budget: int
    seeds: list[int]
    base: list[float]
    """Per seed, benign test accuracy (0..1) of the base at its best trial."""
    immunized: list[float]
    drop: Interval
    """Base minus immunized (0..1), over paired seeds, at the level of two one-sided tests."""
    margin: float
    slow_down: Interval
    """Steps on the immunized model over steps on the base to a share of the base's accuracy; it informs."""
    verdict: Literal["EQUIVALENT", "WORSE", "INCONCLUSIVE", "NOT RUN"]
    reason: str


class Certificate(Record):
    """What was measured on exactly these weights, and by which rule it was judged.

    No cell can be left out: an attack that was planned or that left a trace without having a cell is refused, and so is
    a success that has a cell which was not run.
    """

    protocol: str
    """Name of the exam."""
    planned: list[str]
    """Every attack the exam has; each has its cell, whatever came of it."""

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
    immunization_ratio_spread: Interval | None = None
    """RIR_θ0 with its spread over halves of the rows; ``samples`` counts halves. Null in older certificates."""
    not_run: list[str]
    """Checklist lines of a full certification that this exam did not cover."""
    traces: dict[str, str]
    """SHA-256 of every trace file behind the cells, by path relative to the certificate."""
    provenance: Provenance
    expires: str
    """ISO date after which the certificate should be renewed: attackers improve."""
    files: dict[str, str] = {}
    """SHA-256 of the other files that loading reads (configuration, processor), by path relative to the certificate."""
    benign_data: list[DatasetFingerprint] = []
    trainability: list[Trainability] = []
    """Benign trainability; empty where no third task was tried, which ``not_run`` then says."""
    harmful_metric: str = "accuracy"
    """What the attackers' score (at most 1, higher is better for them) is called."""
    further_utility: list[Utility] = []
    """Other measures of what the primary task is still worth. They inform; verdicts rest on ``utility``."""
    similarity: list[SimilarityGap] = []
    """How like the concept attacked models draw. It informs; verdicts rest on ``cells``."""
    frechet: FrechetGap | None = None
    """How like real images retained concepts are drawn. It informs."""
    task: dict[str, JsonValue] = {}
    """Options that decide the rows, each source by its Hub id, its builder or the last part of its path: with them and
    the data anybody can sit the exam again."""
    utility_rows: dict[str, str] = {}
    """SHA-256 of the answers on every primary row that each utility is computed from, by path; see ``UtilityRows``."""
    samples: dict[str, str] = {}
    """SHA-256 of every picture of what base, model and attacked models draw, by path relative to the certificate."""
    judged_by: Rule | None = None
    """The verdict rule as data, from which ``rule`` and ``threshold_rule`` are worded; null in certificates of the
    first version of the rule."""
    plan: Plan | None = None
    """What the exam asks for and what was run of it; null in certificates of the first version of the rule."""

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return certificate_html(self)

    @model_validator(mode="after")
    def _nothing_is_left_out(self) -> Certificate:
        cells = [cell.attack for cell in self.cells]
        if len(set(cells)) < len(cells):
            raise ValueError("an attack has one cell")
        known = {*cells, *(found.attack for found in self.trainability)}
        files = [name.split("/", 2)[-1] for name in self.traces if not name.startswith("traces/nothing/")]
        strange = [file for file in files if "__" in file and not any(file.startswith(f"{name}__") for name in known)]
        lost = {file.split("__")[0] for file in strange}
        missing = sorted(lost | (set(self.planned) - set(cells)))
        if missing:
            raise ValueError(f"every attack that was planned or run has a cell, {', '.join(missing)} has none")
        bare = [cell.attack for cell in self.cells
                if cell.verdict in ("RESISTS", "FAILS") and (cell.subject is None or cell.control is None)]
        if bare:
            raise ValueError(f"a verdict has figures of subject and control, {', '.join(bare)} has none")
        judged = [attack for family in self.families for attack in family.attacks]
        if sorted(judged) != sorted(cells):
            raise ValueError("every cell belongs to one family, and every family's attacks have cells")
        if self.overall == "RESISTS" and any(cell.verdict == "NOT RUN" for cell in self.cells):
            raise ValueError("an exam with an attack that was not run has no success")
        return self
