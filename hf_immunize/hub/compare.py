"""Two certificates side by side: only what differs."""

from __future__ import annotations

from pathlib import Path

from hf_immunize.hub.names import CERTIFICATE
from hf_immunize.records import Cell, Certificate
from hf_immunize.report import text

Row = tuple[str, str, str]


def read_certificate(target: str | Path) -> Certificate:
    """The certificate at a path, or in a folder. Raises RecordError."""
    path = Path(target)
    return Certificate.read(path / CERTIFICATE if path.is_dir() else path)


def compare_certificates(first: Certificate, second: Certificate) -> list[Row]:
    """What was said and by what evidence, as (what, first, second); equal things are left out."""
    rows = [
        ("model", first.subject.name, second.subject.name),
        ("weights", _short(first.subject.weights), _short(second.subject.weights)),
        ("base", first.control.name, second.control.name),
        ("base weights", _short(first.control.weights), _short(second.control.weights)),
        ("overall", first.overall, second.overall),
        ("examined", first.provenance.created[:10], second.provenance.created[:10]),
        ("expires", first.expires[:10], second.expires[:10]),
        ("rule", first.rule, second.rule),
        ("threshold", first.threshold_rule, second.threshold_rule),
        ("harmful data", _data(first), _data(second)),
        ("primary drop, points", text.points(first.utility.drop, 1.0), text.points(second.utility.drop, 1.0)),
        ("RIR", text.number(first.immunization_ratio), text.number(second.immunization_ratio)),
    ]
    rows += _cells(first, second)
    rows.append(("not run", "; ".join(first.not_run), "; ".join(second.not_run)))
    return [row for row in rows if row[1] != row[2]]


def _cells(first: Certificate, second: Certificate) -> list[Row]:
    mine, theirs = ({cell.attack: cell for cell in item.cells} for item in (first, second))
    return [
        (attack, _said(mine.get(attack)), _said(theirs.get(attack))) for attack in dict.fromkeys([*mine, *theirs])
    ]


def _said(cell: Cell | None) -> str:
    if cell is None:
        return "not in the certificate"
    if cell.subject is None or cell.control is None:
        return cell.verdict
    figure = "" if cell.unit == "solve" else f", slow-down {text.slow_down(cell.slow_down)}"
    before, after = (text.percent(text.accuracy(side)) for side in (cell.control, cell.subject))
    left = f", uplift left {told}" if (told := text.share(cell.uplift_left)) else ""
    return f"{cell.verdict}{figure}{left}, accuracy {before} → {after}, {text.plural(len(cell.seeds), 'seed')}"


def _short(weights: dict[str, str]) -> str:
    return ", ".join(f"{name} {digest[:12]}" for name, digest in sorted(weights.items()))


def _data(certificate: Certificate) -> str:
    return ", ".join(f"{part.role} {part.source} {part.sha256[:12]}" for part in certificate.harmful_data)
