"""Judge again from the published traces, by the certificate's own rule: a verdict that was written in is found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from hf_immunize.errors import ImmunizeError
from hf_immunize.hub.findings import Findings
from hf_immunize.hub.inventory import Inventory
from hf_immunize.hub.names import CERTIFICATE
from hf_immunize.hub.untrusted import parse_record
from hf_immunize.records import AttackTrace, Cell, Certificate


def check_verdicts(certificate: Certificate, inventory: Inventory, findings: Findings) -> None:
    """Recompute every cell, the families and the overall verdict from traces that were found unchanged."""
    from hf_immunize.certification import family_verdicts, find_rule, overall_verdict

    rule = find_rule(certificate)
    if rule is None:
        findings.note("rejudge", CERTIFICATE, "its rule is not one of this release: its verdicts were not recomputed.")
        return
    traces = [parse_record(AttackTrace, inventory.read(name)) for name in certificate.traces if name in inventory]
    cells = []
    for cell in certificate.cells:
        try:
            again = _judge(cell, traces, certificate, rule)
        except (ImmunizeError, ValueError, ArithmeticError, LookupError) as error:
            findings.fail("rejudge", CERTIFICATE, f"the cell of {cell.attack!r} does not follow from traces: {error}")
            return
        if differing := sorted(_differences(cell.model_dump(), again.model_dump())):
            findings.fail("rejudge", CERTIFICATE, f"the cell of {cell.attack!r} is not what its traces give: "
                          f"{', '.join(differing)} (verdict written {cell.verdict}, judged {again.verdict}).")
        cells.append(again)
    if [item.model_dump() for item in family_verdicts(cells)] != [item.model_dump() for item in certificate.families]:
        findings.fail("rejudge", CERTIFICATE, "its verdicts by family are not those of its cells.")
    _check_trainability(certificate, traces, rule, findings)
    overall = overall_verdict(cells, certificate.utility, rule, certificate.trainability)
    if overall != certificate.overall:
        findings.fail("rejudge", CERTIFICATE, f"its overall verdict is written {certificate.overall}, judged {overall}")


def _check_trainability(
    certificate: Certificate, traces: Sequence[AttackTrace], rule: Any, findings: Findings
) -> None:
    """Recompute what the benign runs say."""
    from hf_immunize.certification.trainability import benign_methods, measure_trainability

    benign = {role: [trace for trace in traces if trace.role == role and trace.attack in benign_methods(rule)]
              for role in ("subject", "control")}
    try:
        again = [item.model_dump() for item in measure_trainability(benign, rule)]
    except (ImmunizeError, ValueError, ArithmeticError, LookupError) as error:
        findings.fail("rejudge", CERTIFICATE, f"its benign trainability does not follow from traces: {error}")
        return
    if _differences(again, [item.model_dump() for item in certificate.trainability]):
        findings.fail("rejudge", CERTIFICATE, "its benign trainability is not what its traces give.")


def _judge(cell: Cell, traces: Sequence[AttackTrace], certificate: Certificate, rule: Any) -> Cell:
    """The cell as its traces give it."""
    from hf_immunize.certification.cells import build_cell

    sides: dict[str, list[AttackTrace]] = {"subject": [], "control": [], "scratch": []}
    for trace in traces:
        if trace.attack == cell.attack:
            sides[trace.role].append(trace)
    about: Any = SimpleNamespace(family=cell.family, unit=cell.unit)
    rows = certificate.harmful_data[-1].rows
    return build_cell(cell.attack, about, sides, cell.threshold, rows, rule)


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
