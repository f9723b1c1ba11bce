"""Judge again from the published traces, by the certificate's own rule: a verdict that was written in is found."""

from __future__ import annotations

import math
from typing import Any

from hf_immunize.errors import ImmunizeError
from hf_immunize.hub.findings import Findings
from hf_immunize.hub.inventory import Inventory
from hf_immunize.hub.names import CERTIFICATE
from hf_immunize.hub.untrusted import parse_record
from hf_immunize.records import AttackTrace, Certificate


def check_verdicts(certificate: Certificate, inventory: Inventory, findings: Findings) -> None:
    """Judge traces that were found unchanged by the certificate's plan and rule, and compare every field."""
    from hf_immunize.certification import Evidence, find_rule, judge_traces

    rule = find_rule(certificate)
    if rule is None or certificate.plan is None:
        findings.note("rejudge", CERTIFICATE, "its rule is not one of this release: its verdicts were not recomputed.")
        return
    traces: dict[str, list[AttackTrace]] = {}
    for name in certificate.traces:
        if name in inventory:
            trace = parse_record(AttackTrace, inventory.read(name))
            traces.setdefault(name.split("/")[1], []).append(trace)
    try:
        again = judge_traces(traces, certificate.plan, rule, Evidence.of_certificate(certificate))
    except (ImmunizeError, ValueError, ArithmeticError, LookupError) as error:
        findings.fail("rejudge", CERTIFICATE, f"its verdicts do not follow from its traces: {error}")
        return
    _compare(certificate, again, findings)


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
