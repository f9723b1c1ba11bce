"""Draw one self-contained page that compares a base with its immunized models, and print their verdicts.

    python recipes/report.py --base_path runs/digits-vit/base --output runs/digits-vit/report.html \
        --model_paths runs/digits-vit/condition_number runs/digits-vit/closed_form_adversary
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hf_immunize.errors import ImmunizeError
from hf_immunize.options import parse_options
from hf_immunize.records import Certificate
from hf_immunize.report import render_report


@dataclass
class ReportArguments:
    """What to compare, and where to write it."""

    base_path: str = field(metadata={"help": "Folder of the base."})
    model_paths: list[str] = field(metadata={"help": "Folders of the models, each with its certificate.json."})
    output: str = field(default="report.html", metadata={"help": "The page to write."})


def verdict_table(certificates: list[Certificate]) -> Table:
    """Attacks by models: verdict, and what is behind it in a few words."""
    colours = {"FAILS": "bold red", "RESISTS": "green", "INCONCLUSIVE": "yellow"}
    table = Table(title="Verdicts (slow-down against the base, or accuracy)", show_lines=True)
    table.add_column("attack")
    for certificate in certificates:
        table.add_column(certificate.subject.name)
    for cells in zip(*(certificate.cells for certificate in certificates), strict=True):
        words = []
        for cell in cells:
            if cell.unit == "step":
                factor = cell.slow_down.estimate if cell.slow_down.estimate is not None else cell.slow_down.low
                sign = "" if cell.slow_down.estimate is not None else ">= "
                detail = "-" if factor is None else f"{sign}{factor:.3g}x slower"
            else:
                drop = cell.accuracy_drop.estimate
                detail = "-" if drop is None else f"accuracy {-drop:+.2f}"
            words.append(f"[{colours.get(cell.verdict, 'dim')}]{cell.verdict}[/] {detail}")
        table.add_row(cells[0].attack, *words)
    drops = [f"{c.utility.base:.2f} -> {c.utility.immunized:.2f} %" for c in certificates]
    ratios = ["-" if c.immunization_ratio is None else f"{c.immunization_ratio:.3g}" for c in certificates]
    table.add_row(f"primary {certificates[0].utility.metric}", *drops)
    if any(certificate.spectra for certificate in certificates):
        table.add_row("RIR (explains only)", *ratios)
    table.add_row("overall", *(f"[{colours.get(c.overall, 'dim')}]{c.overall}[/]" for c in certificates))
    return table


def main() -> None:
    (arguments,) = parse_options((ReportArguments,), description=__doc__)
    folders = [Path(path) for path in arguments.model_paths]
    page = render_report(folders, Path(arguments.base_path), Path(arguments.output))
    console = Console()
    console.print(verdict_table([Certificate.read(folder / "certificate.json") for folder in folders]))
    console.print(f"report: {page}")


if __name__ == "__main__":
    try:
        main()
    except ImmunizeError as error:
        sys.exit(f"{type(error).__name__}: {error}")
