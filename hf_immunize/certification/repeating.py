"""Sit a random part of a certified exam again and see whether the stored intervals hold."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_immunize.attacks import ATTACKS, Attack, Run
from hf_immunize.attacks.core.suite import trace_of
from hf_immunize.certification.cells import build_cell
from hf_immunize.errors import RecordError
from hf_immunize.exam import Rule
from hf_immunize.records import AttackTrace, Cell, Certificate, Interval, sha256_file


@dataclass(frozen=True)
class Recheck:
    """One measure of one cell: what the certificate says and what came out this time."""

    attack: str
    measure: str
    stored: Interval
    found: float | None
    resolution: float = 0.0
    """What one test row more or less, on every seed, changes; 0 for a measure that counts no rows."""

    @property
    def agrees(self) -> bool:
        """Whether the new estimate lies within the stored interval; an open bound excludes nothing.

        Where all seeds came out alike the interval has no width. It is taken to reach at least one test row to either
        side: where a row lies at the boundary of two classes, a processor's rounding decides it, for all seeds at once.
        """
        if self.found is None:
            return self.stored.estimate is None
        low, middle, high = self.stored.low, self.stored.estimate, self.stored.high
        if middle is not None and low is not None and high is not None:
            low, high = min(low, middle - self.resolution), max(high, middle + self.resolution)
        return (low is None or self.found >= low - 1e-9) and (high is None or self.found <= high + 1e-9)

    @property
    def told(self) -> str:
        """The comparison as one line."""
        new = "not measurable" if self.found is None else f"{self.found:.3g}"
        low, middle, high = (
            missing if value is None else f"{value:.3g}"
            for value, missing in (
                (self.stored.low, "open"), (self.stored.estimate, "no estimate"), (self.stored.high, "open"),
            )
        )
        held = "agrees" if self.agrees else "DOES NOT AGREE"
        if self.agrees and self.resolution and self.found is not None and self.stored.estimate is not None:
            held += f" (one test row is {self.resolution:.3g})"
        return f"{self.attack} {self.measure}: {new}, certified {middle} ({low} to {high}): {held}"


def recheck(
    folder: str | Path, contexts: Mapping[str, Any], cells: int, seed: int, rule: Rule,
    table: Mapping[str, Attack] = ATTACKS,
) -> list[Recheck]:
    """Run ``cells`` random cells of ``folder/certificate.json`` again, at each side's chosen trial and every seed.

    Args:
        contexts: attack contexts of ``subject`` and ``control``, of the kind that the attacks of ``table`` take.

    Raises:
        RecordError: a certificate of other weights than the contexts', a trace that is not the one it names, or a
            certificate without any cell that was run.
    """
    folder = Path(folder)
    certificate = Certificate.read(folder / "certificate.json")
    for role, bound in (("subject", certificate.subject), ("control", certificate.control)):
        if contexts[role].fingerprint.weights != bound.weights:
            raise RecordError(
                f"expected the {role}'s weights to be those of the certificate, got others: certify these weights anew."
            )
    measured = [cell for cell in certificate.cells if cell.subject and cell.subject.trial and cell.control]
    if not measured:
        raise RecordError(f"expected a certificate with cells that were run in {folder}, got none: attack first.")
    chosen = random.Random(seed).sample(measured, min(cells, len(measured)))
    return [found for cell in chosen for found in _recheck_cell(folder, certificate, cell, contexts, rule, table)]


def _recheck_cell(
    folder: Path, certificate: Certificate, cell: Cell, contexts: Mapping[str, Any], rule: Rule,
    table: Mapping[str, Attack],
) -> list[Recheck]:
    attack = table[cell.attack]
    again: dict[str, list[AttackTrace]] = {}
    for role, side in (("subject", cell.subject), ("control", cell.control)):
        stored = _stored(folder, certificate, cell.attack, role, side.trial if side else None)
        context = contexts[role]
        runs = [Run(attack.config(**_own(trace, attack.config)), "again", trace.seed) for trace in stored]
        again[role] = [
            trace_of(context, cell.attack, attack, run, result, certificate.provenance)
            for run, result in attack.run(context, runs)
        ]
    rows = certificate.harmful_data[-1].rows
    # Each side keeps its own trial, so the two are made comparable by carrying the subject's settings.
    subject = again["subject"]
    control = [
        trace.model_copy(update={"config": next(run.config for run in subject if run.seed == trace.seed)})
        for trace in again["control"]
    ]
    found = build_cell(cell.attack, attack, {"subject": subject, "control": control}, cell.threshold, rows, rule)
    row = 1 / rows if certificate.harmful_metric == "accuracy" else 0.0
    measures = [("accuracy_drop", cell.accuracy_drop, found.accuracy_drop, row)]
    if cell.unit == "step":  # whose interval is never narrower than the spacing of evaluations
        measures.append(("slow_down", cell.slow_down, found.slow_down, 0.0))
    return [Recheck(cell.attack, name, stored, new.estimate, row) for name, stored, new, row in measures]


def _own(trace: AttackTrace, config: type) -> dict[str, object]:
    """The attack's own fields of a trace's config."""
    return {name: value for name, value in trace.config.items() if name in config.__dataclass_fields__}


def _stored(
    folder: Path, certificate: Certificate, attack: str, role: str, trial: str | None
) -> list[AttackTrace]:
    """The certificate's traces of one trial, each checked against its hash."""
    found = []
    for name, digest in certificate.traces.items():
        if not name.startswith(f"traces/{role}/{attack}__"):
            continue
        path = folder / name
        if not path.is_file() or sha256_file(path) != digest:
            raise RecordError(f"expected {path} as it was certified, got another or no file: certify anew.")
        trace = AttackTrace.read(path)
        if trace.trial == trial:
            found.append(trace)
    if not found:
        raise RecordError(f"expected traces of {attack} {trial} on the {role}, got none: the certificate is not whole.")
    return found
