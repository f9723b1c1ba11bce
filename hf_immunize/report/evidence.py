"""What a report is made of: the records of each model's folder, read, checked against each other, and in one order."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hf_immunize.errors import RecordError
from hf_immunize.records import (
    AttackTrace,
    Cell,
    Certificate,
    ImmunizationRecord,
    ModelFingerprint,
    Side,
    sha256_file,
    weight_files,
)

ROLES = ("subject", "control", "scratch")


@dataclass(frozen=True)
class Evidence:
    """The exam of one immunized model, as its folder holds it."""

    label: str
    """The model's name, made unique among the models of one report."""
    certificate: Certificate
    immunization: ImmunizationRecord | None
    traces: tuple[AttackTrace, ...]
    unlisted: int
    """Trace files in the folder that the certificate does not cover; they are counted, not drawn."""
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    """Certified pictures of what was drawn, by name."""

    def cell(self, attack: str) -> Cell | None:
        """The cell of one attack; None where this model's exam does not list it."""
        return next((cell for cell in self.certificate.cells if cell.attack == attack), None)

    def runs(self, attack: str, role: str) -> list[AttackTrace]:
        """The completed runs of the trial the attacker chose, by seed."""
        cell = self.cell(attack)
        side: Side | None = None if cell is None else getattr(cell, role if role in ROLES else "subject")
        if side is None or side.trial is None:
            return []
        chosen = [
            run
            for run in self.traces
            if (run.attack, run.role, run.trial) == (attack, role, side.trial) and run.outcome == "completed"
        ]
        return sorted(chosen, key=lambda run: run.seed)


def read_evidence(folders: Sequence[Path], base: Path | None) -> list[Evidence]:
    """Read every folder and check that all of them were examined against the same base on the same data.

    Without ``base`` the base is the one that the certificates name; its weights are not at hand to be compared.

    Raises:
        RecordError: no folder, a record that is missing or does not fit, a trace file that is not the certified one,
            another base than the certificates', or certificates over different data.
    """
    if not folders:
        raise RecordError("expected at least one folder with a certificate.json, got none: name an immunized model.")
    read = [_read_folder(Path(folder)) for folder in folders]
    _check_one_exam(read, [Path(folder) for folder in folders])
    if base is not None:
        _check_base(read[0].certificate.control, Path(base))
    names = [item.label for item in read]
    return [
        Evidence(
            label=item.label if names.count(item.label) == 1 else f"{item.label} ({Path(folder).resolve().name})",
            certificate=item.certificate,
            immunization=item.immunization,
            traces=item.traces,
            unlisted=item.unlisted,
            pictures=item.pictures,
        )
        for item, folder in zip(read, folders, strict=True)
    ]


def _read_folder(folder: Path) -> Evidence:
    certificate = Certificate.read(folder / "certificate.json")
    record = folder / "immunization.json"
    traces, unlisted = _read_traces(folder, certificate)
    return Evidence(
        label=certificate.subject.name,
        certificate=certificate,
        immunization=ImmunizationRecord.read(record) if record.exists() else None,
        traces=traces,
        unlisted=unlisted,
        pictures=_read_pictures(folder, certificate),
    )


def _read_traces(folder: Path, certificate: Certificate) -> tuple[tuple[AttackTrace, ...], int]:
    """The certified traces, hashes checked. Only files below the folder's own ``traces`` are ever opened."""
    root = folder.resolve()
    blobs = root.parent.parent / "blobs"  # a snapshot of the Hub client's cache is a folder of links into this one
    roots = (root, blobs) if root.parent.name == "snapshots" else (root,)
    found = {path.relative_to(folder).as_posix(): path for path in sorted((folder / "traces").rglob("*.json"))}
    traces = []
    for name, expected in certificate.traces.items():
        path = found.pop(name, None)
        if path is None or not any(path.resolve().is_relative_to(allowed) for allowed in roots):
            raise RecordError(
                f"expected the certified trace {name!r} in {folder}, got no such file below its traces folder: "
                "restore the traces or certify again."
            )
        actual = sha256_file(path)
        if actual != expected:
            raise RecordError(
                f"expected {path} with SHA-256 {expected}, got {actual}: the trace is not the one that was certified; "
                "restore it or certify again."
            )
        traces.append(AttackTrace.read(path))
    return tuple(traces), len(found)


def _read_pictures(folder: Path, certificate: Certificate) -> dict[str, bytes]:
    """The certified pictures, hashes checked. Only PNG files below the folder's own ``samples`` are ever opened."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted((folder / "samples").rglob("*.png"))}
    pictures = {}
    for name, expected in certificate.samples.items():
        path = found.get(name)
        if path is None:
            raise RecordError(
                f"expected the certified picture {name!r} in {folder}, got no such file: restore it or certify again."
            )
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != expected or not data.startswith(b"\x89PNG\r\n"):
            raise RecordError(
                f"expected {path} as it was certified, got another file: restore the picture or certify again."
            )
        pictures[name] = data
    return pictures


def _check_one_exam(read: Sequence[Evidence], folders: Sequence[Path]) -> None:
    """Curves of different bases or data must not share a page."""
    first = read[0].certificate
    for item, folder in zip(read[1:], folders[1:], strict=True):
        other = item.certificate
        if other.control.weights != first.control.weights:
            raise RecordError(
                f"expected every model examined against the base of {folders[0]} ({first.control.name!r}), got another "
                f"base in {folder} ({other.control.name!r}): write one report per base."
            )
        if other.harmful_metric != first.harmful_metric:
            raise RecordError(
                f"expected every exam in {first.harmful_metric!r}, got {other.harmful_metric!r} in {folder}: write one "
                "report for each metric."
            )
        for kind, mine, theirs in (
            ("primary", first.primary_data, other.primary_data),
            ("harmful", first.harmful_data, other.harmful_data),
        ):
            if {(part.role, part.sha256) for part in mine} != {(part.role, part.sha256) for part in theirs}:
                raise RecordError(
                    f"expected the {kind} data of {folders[0]}, got other data in {folder}: "
                    "examine both on the same splits, or write one report for each."
                )


def _check_base(control: ModelFingerprint, base: Path) -> None:
    """The folder named as base must hold exactly the weights that were attacked as control."""
    actual = {path.relative_to(base).as_posix(): sha256_file(path) for path in weight_files(base)}
    if actual != control.weights:
        differ = sorted(set(actual.items()) ^ set(control.weights.items()))
        raise RecordError(
            f"expected in {base} the weights that the certificates call their base ({control.name!r}), got a "
            f"difference in {differ[0][0]!r}: name the base folder the exam was sat with, or certify again."
        )


def attacks_by_family(evidence: Sequence[Evidence]) -> dict[str, list[str]]:
    """Every attack of any model under its family, in the order of the certificates."""
    grouped: dict[str, list[str]] = {}
    for item in evidence:
        for cell in item.certificate.cells:
            attacks = grouped.setdefault(cell.family, [])
            if cell.attack not in attacks:
                attacks.append(cell.attack)
    return grouped
