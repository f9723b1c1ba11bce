"""What came of an exam: as a table, a page, a folder to publish, and in a notebook."""

from __future__ import annotations

import io
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import escape
from rich.console import Console, RenderableType

from hf_immunize.hub.tables import certificate_table
from hf_immunize.records import Certificate
from hf_immunize.report import render_report, text
from hf_immunize.report.text import clean

_COLOURS = {"FAILS": "#b3261e", "RESISTS": "#146c2e", "INCONCLUSIVE": "#8a5300"}


@dataclass(frozen=True)
class ExamResult:
    """The certificate of one model and where its evidence lies.

    Args:
        certificate: every verdict with its interval.
        folder: of the model, with traces, certificate.json and README.md: what may be published.
        base: folder of the base, with its traces.
    """

    certificate: Certificate
    folder: Path
    base: Path

    def table(self) -> RenderableType:
        """Verdicts, failures first; it shows itself with rich in terminals."""
        return certificate_table(self.certificate)

    def rows(self) -> list[dict[str, Any]]:
        """One plain dict for each attack, e.g. for ``pandas.DataFrame``."""
        return [
            {
                "attack": cell.attack, "family": cell.family, "verdict": cell.verdict,
                "slow_down": cell.slow_down.estimate if cell.slow_down is not None else None,
                "accuracy_drop": cell.accuracy_drop.estimate, "reason": cell.reason,
            }
            for cell in self.certificate.cells
        ]  # fmt: skip

    def report(self, path: str | Path | None = None) -> Path:
        """Write the page that compares the model with its base: one file; report.html in the folder by default."""
        return render_report([self.folder], self.base, Path(path or self.folder / "report.html"))

    def save(self, folder: str | Path) -> Path:
        """Copy model, traces, certificate and card to a folder of your own, which must not be there yet.

        Raises:
            FileExistsError: it is there.
        """
        return Path(shutil.copytree(self.folder, folder))

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=120, no_color=True)
        console.print(self.table())
        return console.file.getvalue()  # type: ignore[attr-defined]

    def _repr_html_(self) -> str:
        """What a notebook shows: one row for each attack. All texts are escaped."""
        lines = [
            f"<tr><td>{_plain(cell.attack)}</td><td>{_plain(cell.family)}</td>"
            f"<td style='color:{_COLOURS.get(cell.verdict, 'inherit')};font-weight:600'>{_plain(cell.verdict)}</td>"
            f"<td>{_plain(_detail(cell))}</td></tr>"
            for cell in self.certificate.cells
        ]
        utility = self.certificate.utility
        return (
            f"<table><caption>{_plain(self.certificate.subject.name)} against "
            f"{_plain(self.certificate.control.name)}: <b>{_plain(self.certificate.overall)}</b>. Primary "
            f"{_plain(utility.metric)} {utility.base:.1f} % → {utility.immunized:.1f} %</caption>"
            "<thead><tr><th>attack</th><th>family</th><th>verdict</th><th>against the base</th></tr></thead>"
            f"<tbody>{''.join(lines)}</tbody></table>"
        )


def _detail(cell: Any) -> str:
    """A slow-down with its interval, or the score lost."""
    if cell.unit == "step":
        return text.slow_down(cell.slow_down)
    drop = cell.accuracy_drop.estimate
    return text.NONE if drop is None else f"accuracy {-drop:+.2f}"


def _plain(words: str) -> str:
    return str(escape(clean(words)))
