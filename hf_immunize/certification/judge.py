"""The single judge: traces, plan, rule and what was measured in, certificate out. No other code writes verdicts.

It reads no file and needs no torch, so that whoever has the traces can judge again and compare every field.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

from hf_immunize.certification.adapting import follow_base
from hf_immunize.certification.cells import Traces, build_cell
from hf_immunize.certification.planning import SIDES, with_runs
from hf_immunize.certification.trainability import measure_trainability
from hf_immunize.certification.uplift import guessing, without_model
from hf_immunize.certification.verdict import family_verdicts, overall_verdict, statement
from hf_immunize.errors import IncompleteExamError, RecordError
from hf_immunize.exam import Rule, diffusion_lines_not_run, lines_not_run
from hf_immunize.metrics import immunization_ratio, immunization_ratio_spread
from hf_immunize.records import (
    RULE_VERSION,
    AttackTrace,
    Cell,
    Certificate,
    DatasetFingerprint,
    FrechetGap,
    ModelFingerprint,
    Plan,
    Provenance,
    SimilarityGap,
    SpectrumRecord,
    Utility,
)

GIVEN = "Given by hand."


@dataclass(frozen=True)
class Evidence:
    """What a certificate holds that does not follow from traces: identities, digests, and measurements on models."""

    subject: ModelFingerprint
    control: ModelFingerprint
    primary_data: Sequence[DatasetFingerprint]
    harmful_data: Sequence[DatasetFingerprint]
    """The attacker's three splits; the last one is the test split."""
    utility: Utility
    provenance: Provenance
    traces: Mapping[str, str]
    """SHA-256 of every trace file by its path relative to the certificate."""
    benign_data: Sequence[DatasetFingerprint] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    spectra: Mapping[str, Sequence[SpectrumRecord]] = field(default_factory=dict)
    harmful_metric: str = "accuracy"
    further_utility: Sequence[Utility] = ()
    utility_rows: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of the answers or losses per row that each utility is computed from."""
    similarity: Sequence[SimilarityGap] = ()
    frechet: FrechetGap | None = None
    samples: Mapping[str, str] = field(default_factory=dict)
    task: Mapping[str, Any] = field(default_factory=dict)
    """Options that decide the rows."""

    @classmethod
    def of_certificate(cls, certificate: Certificate) -> Self:
        """The same from a certificate that is judged again."""
        return cls(**{item.name: getattr(certificate, item.name) for item in fields(cls)})


def find_rule(certificate: Certificate) -> Rule | None:
    """The rule in data by which the certificate says it was judged; None where this release does not know it."""
    rule = certificate.judged_by
    return rule if rule is not None and rule.version == RULE_VERSION else None


def judge_traces(
    traces: Mapping[str, Sequence[AttackTrace]], plan: Plan, rule: Rule, evidence: Evidence
) -> Certificate:
    """Every verdict of an exam, and the certificate around them.

    Args:
        traces: every run by role (subject, control, scratch), harmful and benign tasks together.
        plan: what the exam asks for, from ``planning.plan_exam``; what was run of it is filled in from the traces.
        rule: where the lines are drawn.
        evidence: what does not follow from traces.

    Raises:
        IncompleteExamError: no control traces, sides that were not given the same exam, or effort that does not follow
            the base where the plan says that it does.
        RecordError: a rule of another release, or traces of other data, families or weights than the certificate's.
    """
    if rule.version != RULE_VERSION:
        raise RecordError(
            f"expected version {RULE_VERSION} of the verdict rule, got {rule.version}: judge with the release that "
            "wrote the certificate, or certify anew."
        )
    _check_planned(traces, plan)
    harmful, benign = (
        {role: [trace for trace in traces.get(role, ()) if trace.attack in {item.attack for item in table}]
         for role in SIDES}
        for table in ((*plan.attacks, *plan.references), plan.methods)
    )
    _check_evidence(harmful, plan, evidence.harmful_data, "harmful", evidence)
    _check_evidence(benign, plan, evidence.benign_data, "benign", evidence)
    _check_base_held(harmful)
    harmful, plan = follow_base(harmful, with_runs(plan, traces), rule)
    cells = _cells(harmful, plan, rule, evidence)
    learned = measure_trainability(benign, plan.methods, rule)
    referenced = bool(traces.get("nothing"))
    base, immunized = (evidence.spectra.get(name, ()) for name in ("base", "immunized"))
    ratio, parts = immunization_ratio(base, immunized)
    lines = diffusion_lines_not_run if rule.gain else lines_not_run
    return Certificate(
        protocol=plan.protocol, planned=plan.planned, cells=cells, families=family_verdicts(cells),
        overall=overall_verdict(cells, evidence.utility, rule, learned, referenced),
        statement=statement(cells, evidence.utility, rule, evidence.subject.name, learned, referenced),
        rule=rule.in_words(), threshold_rule=rule.threshold_in_words() if plan.threshold is None else GIVEN,
        judged_by=rule, plan=plan, trainability=learned, immunization_ratio=ratio,
        immunization_ratio_parts=parts if evidence.spectra else {},
        immunization_ratio_spread=immunization_ratio_spread(base, immunized, rule.level),
        not_run=lines([trace for found in traces.values() for trace in found], plan.planned),
        expires=_expiry(traces, evidence.provenance, rule), **_as_fields(evidence),
    )  # fmt: skip


def _as_fields(evidence: Evidence) -> dict[str, Any]:
    """The evidence as fields of a certificate."""
    found: dict[str, Any] = {}
    for item in fields(evidence):
        value = getattr(evidence, item.name)
        found[item.name] = list(value) if isinstance(value, tuple) else value
    return found


def _expiry(traces: Traces, provenance: Provenance, rule: Rule) -> str:
    """So long after the last attack: to judge old traces again makes them no younger."""
    last = max(trace.provenance.created[:10] for found in traces.values() for trace in found)
    made = datetime.date.fromisoformat(min(last, provenance.created[:10]))
    return (made + datetime.timedelta(days=rule.valid_days)).isoformat()


def _cells(traces: Traces, plan: Plan, rule: Rule, evidence: Evidence) -> list[Cell]:
    """One cell for every attack that is planned or was run on any side; none can be left out."""
    test = evidence.harmful_data[-1]
    chance = -math.inf if rule.gain else guessing(test.classes)
    anyway = without_model(traces, 0 if rule.gain else test.rows, chance)
    return [
        build_cell(
            item.attack,
            item,
            {role: [trace for trace in found if trace.attack == item.attack] for role, found in traces.items()},
            plan.threshold,
            test.rows,
            rule,
            anyway,
        )
        for item in plan.attacks
    ]


def _check_planned(traces: Mapping[str, Sequence[AttackTrace]], plan: Plan) -> None:
    """Raise unless the base was attacked, and every trace is of an attack that the plan has."""
    if not traces.get("control"):
        raise IncompleteExamError("expected traces of the base, got none: attack it with --role control.")
    for role, found in traces.items():
        known = {item.attack for item in (plan.references if role == "nothing" else (*plan.attacks, *plan.methods))}
        if strange := sorted({trace.attack for trace in found} - known):
            raise RecordError(
                f"expected traces of attacks that the plan has, got {', '.join(strange)} among those of {role}: an "
                "attack that was run cannot be left out. Certify anew."
            )


def _check_evidence(
    traces: Traces, plan: Plan, splits: Sequence[DatasetFingerprint], task: str, evidence: Evidence
) -> None:
    """Raise RecordError for a trace of other data or weights than the exam's, or of another family than the plan's."""
    wanted = [fingerprint.sha256 for fingerprint in splits]
    known = {item.attack: item for item in (*plan.attacks, *plan.methods, *plan.references)}
    weights = {"subject": evidence.subject.weights, "control": evidence.control.weights}
    for role, found in traces.items():
        for trace in found:
            if [fingerprint.sha256 for fingerprint in trace.data] != wanted:
                raise RecordError(
                    f"expected traces on the {task} splits of this exam, got other rows in {role}/{trace.file_name}: "
                    "certify with the task options (dataset, labels, splits, split_seed) the attacks were run with."
                )
            about = known[trace.attack]
            if (trace.family, trace.unit) != (about.family, about.unit):
                raise RecordError(
                    f"expected {trace.attack} to be of {about.family!r} in units of {about.unit}, got {trace.family!r} "
                    f"and {trace.unit} in {role}/{trace.file_name}: attack again with this release."
                )
            if role == "alternative" and trace.model.weights in weights.values():
                raise RecordError(
                    f"expected another public model as alternative, got the model or its base in {role}/"
                    f"{trace.file_name}: its attackers would have what they are compared with. Remove its traces."
                )
            if trace.config.get("plugin") != (None if about.plugin is None else about.plugin.sha256):
                raise RecordError(
                    f"expected {trace.attack} to be the same code as in the plan, got that of another plug-in in "
                    f"{role}/{trace.file_name}: attack again with --overwrite."
                )
            if trace.role != role or trace.model.weights != weights.get(role, trace.model.weights):
                raise RecordError(
                    f"expected a trace of this exam's {role}, got another model in {trace.role}/{trace.file_name}: "
                    "attack again with --overwrite."
                )


def _check_base_held(traces: Traces) -> None:
    """Raise IncompleteExamError where the sides were given different bases: a wrong one weakens the attack."""
    held = {trace.config["base"] for role in ("subject", "control") for trace in traces[role] if "base" in trace.config}
    if len(held) > 1:
        raise IncompleteExamError(
            "expected attackers of subject and control to hold the same base, got different ones: run "
            "hf-immunize attack with the same --base_path on both."
        )
