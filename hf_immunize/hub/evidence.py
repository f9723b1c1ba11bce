"""The evidence behind a certificate, file by file: there, unchanged, and about these weights and rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from hf_immunize.errors import RecordError
from hf_immunize.hub.findings import Findings
from hf_immunize.hub.inventory import Inventory
from hf_immunize.hub.names import CERTIFICATE, kind_of, problem_with
from hf_immunize.hub.untrusted import AnyRecord, parse_record
from hf_immunize.records import AttackTrace, Certificate, UtilityRows


def check_evidence(certificate: Certificate, inventory: Inventory, findings: Findings, *, keep: bool = False) -> None:
    """Every certified trace and every file of answers, each read once.

    Args:
        keep: hold the records in the inventory, for a judge who asks for them next.
    """
    for name, trace in _certified(AttackTrace, certificate.traces, inventory, findings, keep):
        _check_trace(name, trace, certificate, findings)
    for name, rows in _certified(UtilityRows, certificate.utility_rows, inventory, findings, keep):
        _check_rows(name, rows, certificate, findings)
    extra = [name for name in inventory.files
             if kind_of(name) == "trace" and name not in certificate.traces and name not in certificate.utility_rows]
    if extra:
        findings.note("trace-extra", extra[0], f"{len(extra)} trace file(s) that the certificate does not cover.")
    if not certificate.traces and any(cell.subject is not None for cell in certificate.cells):
        findings.fail("trace-missing", CERTIFICATE, "it claims measured attacks, but names no trace of them.")


def _certified(
    kind: type[AnyRecord], listed: Mapping[str, str], inventory: Inventory, findings: Findings, keep: bool
) -> Iterator[tuple[str, AnyRecord]]:
    """The records of certified files by name, one after the other; those that are not what was certified are found."""
    for name, digest in listed.items():
        record = _read(kind, name, digest, inventory, findings)
        if record is not None:
            yield name, record
            if keep:
                inventory.keep(name, record)


def _read(
    kind: type[AnyRecord], name: str, digest: str, inventory: Inventory, findings: Findings
) -> AnyRecord | None:
    """The record of a certified file; None, and a finding, where it is not what was certified."""
    problem = problem_with(name)
    if problem is not None or kind_of(name) != "trace":
        findings.fail("path", CERTIFICATE, f"it names a trace that may not be read: {name!r} "
                      f"({problem or 'not below traces/ or utility/'}). Do not use this certificate.")
        return None
    if name not in inventory:
        findings.fail("trace-missing", name, "expected this certified attack trace, got no such file: restore it.")
        return None
    try:
        data = inventory.read(name)
        if inventory.digest(name) == digest:
            return parse_record(kind, data)
    except RecordError as error:
        findings.fail("trace" if kind is AttackTrace else "utility", name, str(error))
        return None
    findings.fail("trace", name, f"not the trace that was certified: SHA-256 {inventory.digest(name)} instead of "
                  f"{digest}. Restore it.")
    return None


def _check_trace(name: str, trace: AttackTrace, certificate: Certificate, findings: Findings) -> None:
    """A run on these weights, of an attack that the certificate tells."""
    subject = {"subject": certificate.subject, "control": certificate.control}.get(trace.role)
    if subject is not None and not trace.model.is_same(subject):
        findings.fail("trace-weights", name, f"an attack on other weights than the {trace.role} of the certificate: "
                      "the certificate cannot rest on it.")
    told = {cell.attack for cell in certificate.cells} | {method.attack for method in certificate.trainability}
    if trace.role == "nothing" and certificate.plan is not None:  # what is reached without any model has no verdict
        told = {item.attack for item in certificate.plan.references}
    if trace.attack not in told:
        findings.fail("trace-omitted", name, f"the certificate leaves out the attack {trace.attack!r} that this trace "
                      "is of: no attack that was run may be omitted.")


def _check_rows(name: str, rows: UtilityRows, certificate: Certificate, findings: Findings) -> None:
    """Rows behind the utility: of these weights, of this data, of a measure that the certificate tells."""
    if (rows.subject, rows.control) != (certificate.subject.weights, certificate.control.weights):
        findings.fail("utility", name, "answers of other weights than the certificate's: its utility cannot rest on "
                      "them.")
    if rows.data not in {part.sha256 for part in certificate.primary_data}:
        findings.fail("utility", name, "answers on other rows than the primary data that the certificate names.")
    if rows.metric not in {item.metric for item in (certificate.utility, *certificate.further_utility)}:
        findings.fail("utility", name, f"the certificate leaves out {rows.metric!r}, which these answers are of.")
