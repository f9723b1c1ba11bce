"""Draw one self-contained page that compares a base with its immunized models, and print their verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from hf_immunize.hub.tables import verdicts_table
from hf_immunize.options import option, parse_options, required
from hf_immunize.records import Certificate
from hf_immunize.report import render_report


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
    Console().print(verdicts_table([Certificate.read(folder / "certificate.json") for folder in folders]))
    return page


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> Path:
    """The stage on words of a command line."""
    (options,) = parse_options((ReportOptions,), argv, __doc__, prog)
    page = write_report(options)
    print(f"report: {page}")
    return page
