"""Judge again from the published traces, by the certificate's own rule: a verdict that was written in is found."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from hf_immunize.errors import ImmunizeError
from hf_immunize.exam import DIFFUSION_PROTOCOLS, PROTOCOLS
from hf_immunize.exam.presets import CUSTOM, known_attack, run_departures
from hf_immunize.hub.findings import Findings
from hf_immunize.hub.inventory import Inventory
from hf_immunize.hub.names import CERTIFICATE
from hf_immunize.hub.untrusted import parse_record
from hf_immunize.records import RULE_VERSION, AttackTrace, Certificate, Plan, Rule, UtilityRows


def check_verdicts(certificate: Certificate, inventory: Inventory, findings: Findings) -> None:
    """Judge traces that were found unchanged by the certificate's plan and rule, and compare every field.

    Rule and plan are themselves compared with those of this release, the runs with what the plan asks for, and the
    utility with the answers on each row.
    """
    from hf_immunize.certification import Evidence, judge_traces

    rule, plan = certificate.judged_by, certificate.plan
    if rule is None or plan is None:
        findings.fail("rejudge", CERTIFICATE, f"its field {'judged_by' if rule is None else 'plan'!r} is missing: "
                      "without rule and plan in data nothing follows from traces. Certify with this release.")
        return
    traces = _traces(certificate, inventory)
    _check_premises(certificate, rule, plan, traces, findings)
    try:
        measured = _utilities(certificate, inventory, rule, findings)
        evidence = dataclasses.replace(Evidence.of_certificate(certificate), **measured)
        again = judge_traces(traces, plan, rule, evidence)
    except (ImmunizeError, ValueError, ArithmeticError, LookupError) as error:
        findings.fail("rejudge", CERTIFICATE, f"its verdicts do not follow from its traces: {error}")
        return
    _compare(certificate, again, findings)


def _traces(certificate: Certificate, inventory: Inventory) -> dict[str, list[AttackTrace]]:
    """Every certified trace by the role that its folder names."""
    traces: dict[str, list[AttackTrace]] = {}
    for name in certificate.traces:
        if name in inventory:
            trace = parse_record(AttackTrace, inventory.read(name))
            traces.setdefault(name.split("/")[1], []).append(trace)
    return traces


def _check_premises(
    certificate: Certificate, rule: Rule, plan: Plan, traces: Mapping[str, Sequence[AttackTrace]], findings: Findings
) -> None:
    """Rule, plan and identities: what the judge is given, and a liar would rather choose."""
    from hf_immunize.certification.planning import plan_differences

    def wrong(name: str, told: str) -> None:
        findings.fail("rejudge", CERTIFICATE, f"its field {name!r} {told}")

    presets = PROTOCOLS | DIFFUSION_PROTOCOLS
    known = [presets[plan.protocol].rule] if plan.protocol in presets else [item.rule for item in presets.values()]
    if rule.version != RULE_VERSION:
        wrong("judged_by", f"is a rule of version {rule.version}, this release judges by {RULE_VERSION}.")
    elif rule not in known:
        wrong("judged_by", "is not the rule of this exam: its constants were chosen otherwise.")
    if plan.protocol == CUSTOM:
        findings.note("custom", CERTIFICATE, "an exam of its examiner's own making: which attacks, trials and "
                      "thresholds it has was free to choose.")
    else:
        for name in plan_differences(plan):
            wrong(f"plan.{name}", f"is not what the exam {plan.protocol!r} asks for.")
        if departures := run_departures(plan, traces):
            wrong("plan", f"names the exam {plan.protocol!r}, but it was sat with {departures[0]}.")
    for item in (*plan.attacks, *plan.methods):
        if known_attack(item.attack) not in (None, (item.family, item.unit)):
            wrong("plan.attacks", f"puts {item.attack!r} into another family or unit than this release does.")
    if plan.planned != certificate.planned:
        wrong("planned", "is not what its plan says.")
    if certificate.overall == "RESISTS" and certificate.subject.weights == certificate.control.weights:
        wrong("subject", "has the weights of its own base, which cannot resist what its base does not.")
    for name, reason in sorted(_strangers(certificate, traces)):
        wrong(name, reason)


def _strangers(certificate: Certificate, traces: Mapping[str, Sequence[AttackTrace]]) -> set[tuple[str, str]]:
    """Fields that say other things of models and rows than the traces do, and traces whose name is not their own."""
    found = set()
    models = {"subject": certificate.subject, "control": certificate.control}
    for role, runs in traces.items():
        for trace in runs:
            model = models.get(role)
            if model is not None and (model.architecture, model.parameters) != (
                trace.model.architecture, trace.model.parameters
            ):
                found.add((role, "is not the model that its traces are of."))
            task = "benign_data" if trace.attack.startswith("benign_") else "harmful_data"
            written = [(part.rows, part.classes, part.sha256) for part in getattr(certificate, task)]
            if written != [(part.rows, part.classes, part.sha256) for part in trace.data]:
                found.add((task, "does not name the rows that its traces are of."))
            score = str(trace.config.get("metric", "accuracy"))
            if not score.startswith(certificate.harmful_metric):
                found.add(("harmful_metric", f"is not the score of its traces, {score!r}."))
            if f"traces/{role}/{trace.file_name}" not in certificate.traces or _misnamed(trace):
                found.add(("traces", f"holds a run under another name than its own: {trace.file_name}."))
    return found


def _misnamed(trace: AttackTrace) -> bool:
    """Whether a trial's name tells of other settings than its run had."""
    told = dict(part.split("=", 1) for part in trace.trial.split(",") if "=" in part)
    kept = {name: value for name, value in told.items() if name in trace.config}
    return any(_shown(trace.config[name]) != value for name, value in kept.items())


def _shown(value: Any) -> str:
    """A setting as the name of a trial shows it."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _utilities(
    certificate: Certificate, inventory: Inventory, rule: Rule, findings: Findings
) -> dict[str, Any]:
    """Utilities computed again from the answers or losses per row, in the certificate's order."""
    from hf_immunize.certification.primary_rows import judge_utility, rows_differ

    rows = [parse_record(UtilityRows, inventory.read(name)) for name in certificate.utility_rows if name in inventory]
    by_metric = {item.metric: item for item in rows}
    again = []
    for written in (certificate.utility, *certificate.further_utility):
        behind = by_metric.get(written.metric)
        if behind is None:
            findings.fail("rejudge", CERTIFICATE, f"its field 'utility_rows' has no answers behind {written.metric!r}.")
            again.append(written)
            continue
        again.append(judge_utility(behind, rule.level))
        if told := rows_differ(behind, certificate.primary_data):
            findings.fail("rejudge", CERTIFICATE, f"its field 'primary_data' does not name the rows of "
                          f"{written.metric!r}: {told}.")
    return {"utility": again[0], "further_utility": again[1:]}


def _compare(certificate: Certificate, again: Certificate, findings: Findings) -> None:
    """One finding for every cell and every other field that is not what its traces give."""
    judged = {cell.attack: cell for cell in again.cells}
    for cell in certificate.cells:
        mine = judged.pop(cell.attack, None)
        if mine is None:
            findings.fail("rejudge", CERTIFICATE, f"the cell of {cell.attack!r} is not one that its plan has.")
        elif differing := sorted(_differences(cell.model_dump(), mine.model_dump())):
            findings.fail("rejudge", CERTIFICATE, f"the cell of {cell.attack!r} is not what its traces give: "
                          f"{', '.join(differing)} (verdict written {cell.verdict}, judged {mine.verdict}).")
    for name in judged:
        findings.fail("rejudge", CERTIFICATE, f"the cell of {name!r} is missing.")
    written, found = (item.model_dump(exclude={"cells"}) for item in (certificate, again))
    for name, told in (("families", "its verdicts by family are not those of its cells."),
                       ("trainability", "its benign trainability is not what its traces give.")):
        if _differences(written.pop(name), found.pop(name), name):
            findings.fail("rejudge", CERTIFICATE, told)
    if written.pop("overall") != found.pop("overall"):
        findings.fail("rejudge", CERTIFICATE, f"its overall verdict is written {certificate.overall}, judged "
                      f"{again.overall}")
    for name in sorted(_differences(written, found)):
        findings.fail("rejudge", CERTIFICATE, f"its field {name!r} is not what traces, plan and rule give.")


def _differences(mine: Any, theirs: Any, where: str = "") -> set[str]:
    """Names of the fields whose values differ by more than rounding."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        return {name for key in mine | theirs
                for name in _differences(mine.get(key), theirs.get(key), where or str(key))}
    if isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
        return {name for pair in zip(mine, theirs, strict=True) for name in _differences(*pair, where)}
    if isinstance(mine, float) and isinstance(theirs, float):
        return set() if math.isclose(mine, theirs, rel_tol=1e-6, abs_tol=1e-9) else {where}
    return set() if mine == theirs else {where}
