"""A certificate and a verification in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group as Stack
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from hf_immunize.hub.card import FAILURES_FIRST
from hf_immunize.hub.findings import Verification
from hf_immunize.hub.leaderboard import COLUMNS, Group, row_of
from hf_immunize.records import Cell, Certificate
from hf_immunize.report import text
from hf_immunize.report.text import clean

_COLOURS = {"FAILS": "bold red", "RESISTS": "green", "INCONCLUSIVE": "yellow"}
_MARKS = {"fail": ("FAIL", "bold red"), "policy": ("POLICY", "yellow"), "note": ("note", "dim")}


def certificate_table(certificate: Certificate) -> RenderableType:
    """Verdicts, failures first, then utility, data and what was not run. Every text is inert."""
    title = f"{certificate.subject.name} against {certificate.control.name}: {certificate.overall}"
    table = Table(title=_plain(title), title_justify="left")
    score = f"harmful {clean(certificate.harmful_metric)}"
    for column in ("attack and family", "verdict", "slow-down", score, "effort"):
        table.add_column(column, no_wrap=column in ("attack and family", "verdict"))
    for cell in sorted(certificate.cells, key=lambda cell: FAILURES_FIRST.index(cell.verdict)):
        table.add_row(*_row(cell))
    utility = certificate.utility
    lines = [
        certificate.statement,
        f"Primary {utility.metric}: {utility.base:.1f}% → {utility.immunized:.1f}%, drop "
        f"{text.points(utility.drop, 1.0)} points over {text.plural(utility.rows, 'row')}.",
        *(f"Beside it, {item.metric}: {item.base:.1f}% → {item.immunized:.1f}%, drop {text.points(item.drop, 1.0)} "
          f"points over {text.plural(item.rows, 'row')}." for item in certificate.further_utility),
        *([f"Relative immunization ratio: {text.ratio(certificate)} (explains, does not certify)."]
          if certificate.spectra else []),
        f"Examined on {certificate.provenance.created[:10]}, expires on {certificate.expires[:10]}, "
        f"{text.plural(len(certificate.traces), 'attack trace')}.",
        f"Not run: {'; '.join(certificate.not_run) or 'the certificate names nothing'}.",
    ]
    return Stack(table, *map(_plain, lines))


def verdicts_table(certificates: Sequence[Certificate]) -> RenderableType:
    """Attacks by models: each verdict with its slow-down, or with the accuracy lost. Every text is inert."""
    table = Table(title="Verdicts (slow-down against the base, or accuracy)", show_lines=True)
    for name in ("attack", *(certificate.subject.name for certificate in certificates)):
        table.add_column(_plain(name))
    columns = [{cell.attack: cell for cell in certificate.cells} for certificate in certificates]
    for attack in dict.fromkeys(name for column in columns for name in column):
        table.add_row(_plain(attack), *(_verdict(column.get(attack)) for column in columns))
    drops = [f"{c.utility.base:.2f} → {c.utility.immunized:.2f} %" for c in certificates]
    table.add_row(_plain(f"primary {certificates[0].utility.metric}"), *drops)
    if any(certificate.spectra for certificate in certificates):
        table.add_row("RIR (explains only)", *(text.number(c.immunization_ratio) for c in certificates))
    table.add_row("overall", *(Text(c.overall, style=_COLOURS.get(c.overall, "dim")) for c in certificates))
    return table


def _verdict(cell: Cell | None) -> Text:
    """A cell in a few words; nothing for an attack that is not in a model's exam."""
    if cell is None:
        return Text(text.NONE)
    drop = cell.accuracy_drop.estimate
    lost = text.NONE if drop is None else f"accuracy {-drop:+.2f}"
    detail = text.slow_down(cell.slow_down) if cell.unit == "step" else lost
    return Text.assemble((cell.verdict, _COLOURS.get(cell.verdict, "dim")), " ", detail)


def findings_table(found: Verification) -> RenderableType:
    """Every finding with its file, failures first."""
    table = Table(show_header=False, box=None, padding=(0, 1, 0, 0))
    order = ("fail", "policy", "note")
    for finding in sorted(found.findings, key=lambda finding: order.index(finding.level)):
        mark, style = _MARKS[finding.level]
        table.add_row(Text(mark, style=style), _plain(finding.file), _plain(finding.message))
    return table


def outcome(found: Verification) -> Text:
    """Who says so and what came of it, in one line. Hashes that fit make files intact, not true."""
    told = str(found.trust)
    who = told[:1].upper() + told[1:]
    said = "" if found.certificate is None else f" It says: {found.certificate.overall}."
    if not found.sound:
        return Text("UNSOUND: the files are not what their certificate says, or it is not what they say.", "bold red")
    if not found.ok:
        return Text(f"{who}. Intact, but the policy asks for more.{said}", style="yellow")
    return Text(f"{who}. Intact: the files are what the certificate says.{said}", style="green")


def group_table(group: Group) -> RenderableType:
    """Certificates of one exam: a column for each model, since models are fewer than what is told of them."""
    table = Table(title=_plain(group.title), title_justify="left", show_lines=True)
    rows = [row_of(entry, group.families) for entry in group.entries]
    table.add_column("")
    for row in rows:
        table.add_column(_plain(row[0]), overflow="fold")
    for place, name in enumerate((*COLUMNS, *group.families)):
        if place:
            table.add_row(_plain(name), *(_plain(row[place]) for row in rows))
    return table


def files_table(files: Iterable[tuple[str, int, str]]) -> RenderableType:
    """Name, size and what happens to each file."""
    table = Table(show_header=True, box=None)
    table.add_column("file", overflow="fold")
    table.add_column("bytes", justify="right")
    table.add_column("")
    for name, size, what in files:
        table.add_row(_plain(name), f"{size:,}" if size >= 0 else "", what)
    return table


def differences_table(rows: Iterable[tuple[str, str, str]], names: tuple[str, str]) -> RenderableType:
    """What differs between two certificates."""
    table = Table()
    for column in ("", *names):
        table.add_column(_plain(column), overflow="fold")
    for row in rows:
        table.add_row(*map(_plain, row))
    return table


def _row(cell: Cell) -> list[Text]:
    measured = cell.subject is not None and cell.control is not None
    before, after = (text.percent(text.accuracy(side)) for side in (cell.control, cell.subject))
    return [
        Text.assemble(clean(cell.attack), "\n", (clean(cell.family), "dim")),
        Text(cell.verdict, style=_COLOURS.get(cell.verdict, "dim")),
        _plain(text.slow_down(cell.slow_down) if measured and cell.unit == "step" else text.NONE),
        _plain(f"{before} → {after}" if measured else text.NONE),
        _plain(f"{text.plural(len(cell.seeds), 'seed')} × {text.plural(cell.budget, cell.unit)}" if measured else ""),
    ]


def _plain(words: str) -> Text:
    """Text without markup or control characters, whatever it holds."""
    return Text(clean(words))
