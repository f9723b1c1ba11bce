"""Judge again from the published traces, by the certificate's own rule: a verdict that was written in is found."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from hf_immunize.errors import ImmunizeError
from hf_immunize.hub.findings import Findings
from hf_immunize.hub.inventory import Inventory
from hf_immunize.hub.names import CERTIFICATE, kind_of
from hf_immunize.hub.premises import check_premises
from hf_immunize.records import AttackTrace, Certificate, Rule, UtilityRows


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
    check_premises(certificate, rule, plan, traces, findings)
    _check_loaded(certificate, inventory, findings)
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
            trace = inventory.record(AttackTrace, name)
            traces.setdefault(name.split("/")[1], []).append(trace)
    return traces


def _check_loaded(certificate: Certificate, inventory: Inventory, findings: Findings) -> None:
    """The exam names the configuration that it loaded, or the same weights could be made to act differently."""
    loaded = [name for name in inventory.files if kind_of(name) == "loading"]
    if loaded and not certificate.files:
        findings.fail("rejudge", CERTIFICATE, f"its field 'files' is empty, although loading reads {loaded[0]}.")


def _utilities(
    certificate: Certificate, inventory: Inventory, rule: Rule, findings: Findings
) -> dict[str, Any]:
    """Utilities computed again from the answers or losses per row, in the certificate's order."""
    from hf_immunize.certification.primary_rows import judge_utility, measures_differ, rows_differ

    told = measures_differ([item.metric for item in (certificate.utility, *certificate.further_utility)], rule,
                           certificate.harmful_metric)
    if told:
        findings.fail("rejudge", CERTIFICATE, f"its field 'utility' {told}.")
    rows = [inventory.record(UtilityRows, name) for name in certificate.utility_rows if name in inventory]
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
    if {part.sha256 for part in certificate.primary_data} != {item.data for item in rows}:
        findings.fail("rejudge", CERTIFICATE, "its field 'primary_data' names rows that no answers are of.")
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
