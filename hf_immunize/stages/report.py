"""Draw one self-contained page that compares a base with its immunized models, and print their verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hf_immunize.options import option, parse_options, required
from hf_immunize.records import Cell, Certificate
from hf_immunize.report import render_report

_COLOURS = {"FAILS": "bold red", "RESISTS": "green", "INCONCLUSIVE": "yellow"}


@dataclass
class ReportOptions:
    """What to compare, and where to write it."""

    model_paths: list[str] = required("Folders of the models, each with its certificate.json.")
    base_path: str | None = option(None, "Folder of the base they were examined against, whose weights are compared.")
    output: str | None = option(None, "The page to write; report.html in the first model's folder by default.")


def write_report(options: ReportOptions) -> Path:
    """Write the page, print the verdicts, and return where the page lies.

    Raises:
        RecordError: a folder without a readable certificate.
    """
    folders = [Path(path) for path in options.model_paths]
    base = None if options.base_path is None else Path(options.base_path)
    page = render_report(folders, base, Path(options.output or folders[0] / "report.html"))
    console = Console()
    console.print(verdict_table([Certificate.read(folder / "certificate.json") for folder in folders]))
    return page


def verdict_table(certificates: Sequence[Certificate]) -> Table:
    """Attacks by models: verdict, and what is behind it in a few words."""
    table = Table(title="Verdicts (slow-down against the base, or accuracy)", show_lines=True)
    table.add_column("attack")
    for certificate in certificates:
        table.add_column(certificate.subject.name)
    columns = [{cell.attack: cell for cell in certificate.cells} for certificate in certificates]
    for attack in dict.fromkeys(name for column in columns for name in column):
        table.add_row(attack, *(_verdict(column.get(attack)) for column in columns))
    drops = [f"{c.utility.base:.2f} -> {c.utility.immunized:.2f} %" for c in certificates]
    ratios = ["-" if c.immunization_ratio is None else f"{c.immunization_ratio:.3g}" for c in certificates]
    table.add_row(f"primary {certificates[0].utility.metric}", *drops)
    if any(certificate.spectra for certificate in certificates):
        table.add_row("RIR (explains only)", *ratios)
    table.add_row("overall", *(f"[{_COLOURS.get(c.overall, 'dim')}]{c.overall}[/]" for c in certificates))
    return table


def _verdict(cell: Cell | None) -> str:
    """A cell in a few words; a dash for an attack that is not in a model's exam."""
    if cell is None:
        return "-"
    if cell.unit == "step":
        factor = cell.slow_down.estimate if cell.slow_down.estimate is not None else cell.slow_down.low
        sign = "" if cell.slow_down.estimate is not None else ">= "
        detail = "-" if factor is None else f"{sign}{factor:.3g}x slower"
    else:
        drop = cell.accuracy_drop.estimate
        detail = "-" if drop is None else f"accuracy {-drop:+.2f}"
    return f"[{_COLOURS.get(cell.verdict, 'dim')}]{cell.verdict}[/] {detail}"


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> Path:
    """The stage on words of a command line."""
    (options,) = parse_options((ReportOptions,), argv, __doc__, prog)
    page = write_report(options)
    print(f"report: {page}")
    return page
