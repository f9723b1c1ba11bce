"""The curves of one exam as pictures for its model card: files of their own, which need no page around them."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from markupsafe import Markup

from hf_immunize.records import Certificate
from hf_immunize.report import svg, view
from hf_immunize.report.evidence import Evidence, attacks_by_family, read_evidence
from hf_immunize.report.text import clean

_CHART_RULES = (".chart", ".line", ".band", ".threshold", ".arrival", ".whisker", ".noise", ".mark", ".seed")
_SIZE = re.compile(r'viewBox="0 0 (\S+) (\S+)"')
_MARGIN, _HEAD, _LONGEST = 12, 66, 48
_EMPTY = Markup('<svg viewBox="0 0 340 24" class="chart"><text x="0" y="16">Nothing to draw.</text></svg>')


def picture_names(certificate: Certificate) -> dict[str, str]:
    """Attack → file of its picture, relative to the certificate, for every attack that left a result on either side.

    The names follow from the certificate alone, so that a card can be compared without its pictures.
    """
    drawn = [
        cell.attack for cell in certificate.cells
        if any(side is not None and side.accuracy for side in (cell.subject, cell.control))
    ]
    return {
        attack: f"plots/{index:02}-{re.sub('[^a-z0-9]+', '-', attack.lower())[:40].strip('-') or 'attack'}.svg"
        for index, attack in enumerate(drawn, 1)
    }


def curve_pictures(folder: str | Path) -> dict[str, bytes]:
    """Every picture of the exam in ``folder``, drawn from its traces, by the name of its file.

    Raises:
        RecordError: the certificate or a trace it names is missing or not the certified one.
    """
    (evidence,) = read_evidence([Path(folder)], None)
    attacks = [attack for members in attacks_by_family([evidence]).values() for attack in members]
    figures = dict(zip(attacks, view.figures([evidence]), strict=True))
    return {
        name: _standalone(figures[attack], evidence).encode()
        for attack, name in picture_names(evidence.certificate).items()
    }


def _standalone(figure: view.Figure, evidence: Evidence) -> str:
    """An SVG file: the chart below its title and legend, on paper of its own, with the page's colours."""
    chart = figure.chart or _EMPTY
    found = _SIZE.search(chart)
    assert found is not None  # every chart of this room has one
    width, height = float(found[1]), float(found[2])
    parts = [
        svg.element("rect", width=width + 2 * _MARGIN, height=height + _HEAD + _MARGIN, class_="paper"),
        svg.element("text", _cut(f"{figure.title} ({figure.family})"), x=_MARGIN, y=22, class_="title"),
        *(_legend_entry(item["swatch"], item["label"], row) for row, item in enumerate(view.legend([evidence], False))),
        svg.element("svg", chart, x=_MARGIN, y=_HEAD, width=width, height=height),
    ]
    return svg.element(
        "svg", svg.element("title", figure.title), svg.element("style", chart_style()), *parts,
        xmlns="http://www.w3.org/2000/svg", width=width + 2 * _MARGIN, height=height + _HEAD + _MARGIN,
        viewBox=f"0 0 {width + 2 * _MARGIN:g} {height + _HEAD + _MARGIN:g}",
    ) + "\n"


def _legend_entry(swatch: Markup, label: str, row: int) -> Markup:
    down = 38 + 16 * row
    return svg.element("svg", swatch, x=_MARGIN, y=down - 10, width=34, height=14) + svg.element(
        "text", _cut(label), x=_MARGIN + 42, y=down + 1, class_="key"
    )


def _cut(label: str) -> str:
    label = clean(label)
    return label if len(label) <= _LONGEST else f"{label[: _LONGEST - 1]}…"


@cache
def chart_style() -> str:
    """The page's own rules for charts, in its light colours: a picture does not know what surrounds it."""
    lines = (Path(__file__).parent / "page.css").read_text(encoding="utf-8").splitlines()
    colours = lines[: lines.index("}") + 1]
    rules = [line for line in lines if line.startswith(_CHART_RULES)]
    own = (
        "svg { font: 12px system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'DejaVu Sans', sans-serif; } "
        ".paper { fill: var(--card); } .title { fill: var(--ink); font-weight: 650; font-size: 14px; } "
        ".key { fill: var(--ink); }"
    )
    return "\n".join([*colours, *rules, own])
