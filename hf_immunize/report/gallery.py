"""What base and models draw, before and after each attack: certified pictures, embedded in the page."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from hf_immunize.records import Side
from hf_immunize.report import charts
from hf_immunize.report.charts import BASE, SCRATCH, Style, style_of
from hf_immunize.report.evidence import Evidence, attacks_by_family


@dataclass(frozen=True)
class _Place:
    """One model's place in every row of pictures."""

    label: str
    style: Style
    item: Evidence
    role: str


def galleries(evidence: Sequence[Evidence]) -> list[dict[str, Any]]:
    """Rows of pictures: retained classes, the concept before any attack, and after each attack; empty ones left out."""
    places = [_Place("Base", BASE, evidence[0], "control")]
    places += [_Place(item.label, style_of(index), item, "subject") for index, item in enumerate(evidence)]
    rows = [
        ("Retained classes", [(place, f"samples/{place.role}/retained.png") for place in places]),
        ("The concept, before any attack", [(place, f"samples/{place.role}/before.png") for place in places]),
    ]
    everyone = [*places, _Place("From scratch", SCRATCH, evidence[0], "scratch")]
    for attacks in attacks_by_family(evidence).values():
        for attack in attacks:
            named = [(place, name) for place in everyone if (name := _after(place, attack))]
            rows.append((f"The concept, after {attack.replace('_', ' ')}", named))
    found = [{"title": title, "pictures": list(_pictures(title, named))} for title, named in rows]
    return [gallery for gallery in found if gallery["pictures"]]


def _after(place: _Place, attack: str) -> str | None:
    """The picture of the first seed of the trial that the attacker chose."""
    cell = place.item.cell(attack)
    side: Side | None = None if cell is None else getattr(cell, "subject" if place.role == "subject" else place.role)
    if side is None or side.trial is None:
        return None
    names = [
        f"samples/{run.role}/{run.file_name.removesuffix('.json')}.png" for run in place.item.runs(attack, place.role)
    ]
    return next((name for name in names if name in place.item.pictures), None)


def _pictures(title: str, named: Sequence[tuple[_Place, str]]) -> Iterator[dict[str, Any]]:
    for place, name in named:
        data = place.item.pictures.get(name)
        if data is not None:
            source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
            yield {
                "label": place.label, "swatch": charts.swatch(place.style), "source": Markup(source),
                "alt": f"{title}, drawn by {place.label}",
            }
