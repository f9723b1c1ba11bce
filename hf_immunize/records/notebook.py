"""A certificate as notebooks show it: one row for each attack, every text escaped."""

from __future__ import annotations

import html
from typing import Any

COLOURS = {"FAILS": "#b3261e", "RESISTS": "#146c2e", "INCONCLUSIVE": "#8a5300"}
_ORDER = ("FAILS", "INCONCLUSIVE", "NOT RUN", "NOT APPLICABLE", "NOTHING TO PROTECT", "RESISTS")


def certificate_html(certificate: Any) -> str:
    """Overall verdict, primary metric, and the cells, failures first, each with its reason."""
    cells = sorted(certificate.cells, key=lambda cell: _ORDER.index(cell.verdict))
    lines = [
        f"<tr><td>{_plain(cell.attack)}</td><td>{_plain(cell.family)}</td>"
        f"<td style='color:{COLOURS.get(cell.verdict, 'inherit')};font-weight:600'>{_plain(cell.verdict)}</td>"
        f"<td style='text-align:left'>{_plain(cell.reason)}</td></tr>"
        for cell in cells
    ]
    utility = certificate.utility
    return (
        f"<table><caption>{_plain(certificate.subject.name)} against {_plain(certificate.control.name)}: "
        f"<b>{_plain(certificate.overall)}</b>. Primary {_plain(utility.metric)} {utility.base:.1f} → "
        f"{utility.immunized:.1f}. Valid until {_plain(certificate.expires)}.</caption>"
        "<thead><tr><th>attack</th><th>family</th><th>verdict</th><th>why</th></tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table>"
    )


def _plain(words: str) -> str:
    """Text of a file that anybody may have written, without markup and control characters."""
    return html.escape("".join(letter for letter in words if letter.isprintable() or letter == " "))
