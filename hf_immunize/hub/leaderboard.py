"""Many certificates side by side, with their level of trust: never those of different exams in one table."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hf_immunize.errors import RecordError
from hf_immunize.hub.findings import Verification
from hf_immunize.hub.levels import LEVELS
from hf_immunize.hub.load import verify_model
from hf_immunize.hub.names import IMMUNIZATION
from hf_immunize.records import Cell, Certificate, ImmunizationRecord
from hf_immunize.report import text
from hf_immunize.report.text import clean

_STRONGEST_FIRST = ("FAILS", "INCONCLUSIVE", "NOT RUN", "NOTHING TO PROTECT", "RESISTS", "NOT APPLICABLE")


@dataclass(frozen=True)
class Entry:
    """One model with what its verification found and how it was immunized."""

    source: str
    """Folder name or Hub id."""
    found: Verification
    certificate: Certificate
    immunization: ImmunizationRecord | None

    @property
    def method(self) -> str:
        """Objective of the immunization; a dash where nothing tells it."""
        told = None if self.immunization is None else self.immunization.config.get("objective")
        return text.NONE if told is None else clean(str(told))

    @property
    def cost(self) -> str:
        """Optimizer steps of the immunization and the seconds they took."""
        made = self.immunization
        return text.NONE if made is None else f"{made.steps:,} steps, {made.seconds:,.0f} s"


@dataclass(frozen=True)
class Group:
    """Entries that sat the same exam: same rows, rule, preset and base."""

    title: str
    about: tuple[tuple[str, str], ...]
    """What all of them share, by name."""
    entries: tuple[Entry, ...]
    families: tuple[str, ...]


def read_entries(
    targets: Iterable[str | Path], *, rejudge: bool = False, trusted_key: str | Path | None = None,
    checker_keys: Collection[str | Path] = (), **fetching: Any,
) -> list[Entry]:
    """Verify every folder or Hub id, and read what belongs to it.

    Args:
        rejudge: also judge each again from its traces.
        fetching: see ``fetch``.

    Raises:
        RecordError: a folder without a certificate that can be read, or no target at all.
        HubError, VerificationError: as ``verify_model``.
    """
    entries = []
    for target in targets:
        folder, found = verify_model(
            target, rejudge=rejudge, trusted_key=trusted_key, checker_keys=checker_keys, **fetching
        )
        if found.certificate is None:
            raise RecordError(f"expected a certificate in {target}, got none that can be read: leave it out.")
        record = folder / IMMUNIZATION
        made = ImmunizationRecord.read(record) if record.is_file() and found.sound else None
        name = folder.resolve().name if Path(target).is_dir() else str(target)
        entries.append(Entry(name, found, found.certificate, made))
    if not entries:
        raise RecordError("expected at least one folder or 'owner/name' with a certificate, got none.")
    return entries


def group_entries(entries: Sequence[Entry]) -> list[Group]:
    """Entries by what makes them comparable, each group with what it shares and, where there are several, in what it
    differs from the first."""
    kinds: dict[tuple[tuple[str, str], ...], list[Entry]] = {}
    for entry in entries:
        kinds.setdefault(_shared(entry.certificate), []).append(entry)
    first = next(iter(kinds), ())
    groups = []
    for number, (about, members) in enumerate(kinds.items(), 1):
        others = [name for (name, mine), (_, theirs) in zip(about, first, strict=True) if mine != theirs]
        title = "Same exam" if len(kinds) == 1 else f"Exam {number}"
        if others:
            title += f", NOT comparable with exam 1: another {', another '.join(others)}"
        families = dict.fromkeys(cell.family for entry in members for cell in entry.certificate.cells)
        groups.append(Group(title, about, tuple(members), tuple(families)))
    return groups


def _shared(certificate: Certificate) -> tuple[tuple[str, str], ...]:
    """What has to agree before two certificates may stand in one table."""
    return (
        ("harmful data", _data(certificate.harmful_data)),
        ("primary data", _data(certificate.primary_data)),
        ("exam", certificate.protocol),
        ("rule", certificate.rule),
        ("threshold", certificate.threshold_rule),
        ("base", ", ".join(digest[:12] for _, digest in sorted(certificate.control.weights.items()))),
    )


def _data(parts: Sequence[Any]) -> str:
    return "; ".join(f"{clean(part.source)} {clean(part.role)} {part.sha256[:12]}" for part in parts)


COLUMNS = ("model", "who says so", "overall", "method", "harmful task", "uplift left", "primary drop, points",
           "cost of immunization")


def row_of(entry: Entry, families: Sequence[str]) -> list[str]:
    """The cells of a table's row: ``COLUMNS``, then one per family of attackers."""
    certificate = entry.certificate
    known = [entry.source, str(entry.found.trust) if entry.found.sound else "UNSOUND",
             certificate.overall, entry.method, clean(certificate.harmful_data[-1].source), _most_left(certificate),
             text.points(certificate.utility.drop, 1.0), entry.cost]
    return [*known, *(_family(certificate, family) for family in families)]


def keys_of(entry: Entry, families: Sequence[str]) -> list[float | None]:
    """What each cell of ``row_of`` is sorted by; None where its words are."""
    certificate, made = entry.certificate, entry.immunization
    found = entry.found
    worst = _worst(certificate.cells)
    return [
        None, LEVELS.index(found.trust.level) if found.sound else -1, _order(certificate.overall), None, None,
        None if worst is None else _left(worst), certificate.utility.drop.estimate,
        None if made is None else made.steps,
        *(None if cell is None else _order(cell.verdict) - min(max(_left(cell) or 0.0, 0.0), 9.9) / 10
          for cell in (_strongest(certificate, family) for family in families)),
    ]


def _order(verdict: str) -> float:
    """Weakest models first."""
    return float(_STRONGEST_FIRST.index(verdict))


def _left(cell: Cell) -> float | None:
    """Share of the base's uplift that an attack still gets."""
    return None if cell.uplift_left is None else cell.uplift_left.estimate


def _worst(cells: Sequence[Cell]) -> Cell | None:
    """The attack that keeps most of what the base gives."""
    return max((cell for cell in cells if _left(cell) is not None), key=lambda cell: _left(cell) or 0.0, default=None)


def _most_left(certificate: Certificate) -> str:
    """That share, with whose it is."""
    worst = _worst(certificate.cells)
    return text.NONE if worst is None else f"{text.share(worst.uplift_left)} ({clean(worst.attack)})"


def _strongest(certificate: Certificate, family: str) -> Cell | None:
    """The strongest attacker of a family: by verdict, then by the uplift that is left, then by score."""
    members = [cell for cell in certificate.cells if cell.family == family]
    return min(members, default=None, key=lambda item: (
        _order(item.verdict), -(_left(item) or 0.0), -(text.accuracy(item.subject) or 0.0)))


def _family(certificate: Certificate, family: str) -> str:
    """That attacker in words: verdict, slow-down where it takes steps, uplift left, score on base and model."""
    cell = _strongest(certificate, family)
    return text.NONE if cell is None else f"{cell.verdict}{_figures(cell)}"


def _figures(cell: Cell) -> str:
    if cell.subject is None or cell.control is None:
        return ""
    slow = f", {text.slow_down(cell.slow_down)}" if cell.unit == "step" else ""
    left = f", uplift left {told}" if (told := text.share(cell.uplift_left)) else ""
    before, after = (text.percent(text.accuracy(side)) for side in (cell.control, cell.subject))
    return f"{slow}{left}, {before} → {after} ({clean(cell.attack)})"


def leaderboard_html(groups: Sequence[Group]) -> str:
    """One page: a sortable table for each group, no network, every text inert."""
    tables = [
        {
            "title": group.title, "about": group.about, "columns": [*COLUMNS, *group.families],
            "rows": [list(zip(row_of(entry, group.families), keys_of(entry, group.families), strict=True))
                     for entry in group.entries],
        }
        for group in groups
    ]
    return _environment().get_template("leaderboard.html.jinja").render(tables=tables)


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )
