"""progress.html in a run's folder: how far each stage is and every verdict so far, written again after each stage."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from hf_immunize.errors import RecordError
from hf_immunize.records import Certificate, ImmunizationRecord, atomic_write
from hf_immunize.report.text import clean
from hf_immunize.stages.workflow.stages import Stage

NAME = "progress.html"
_SECONDS = 10
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1b1b1b;"
    "background:#fff}table{border-collapse:collapse;margin:1rem 0}td,th{text-align:left;padding:.2rem .8rem .2rem 0;"
    "vertical-align:top}caption{text-align:left}"
)


class ProgressPage:
    """One page without script, which a browser loads again by itself while the run goes.

    Args:
        folder: of the run.
        stages: all of it, in order.
    """

    def __init__(self, folder: Path, stages: Mapping[str, Stage]):
        self.path, self._stages = folder / NAME, stages
        self._told: dict[str, str] = {}

    def __enter__(self) -> ProgressPage:
        self._write(live=True)
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._write(live=False, stopped=kind is not None)

    def tell(self, name: str, state: str) -> None:
        """A stage is at work, whole, or was so before."""
        self._told[name] = state
        self._write(live=True)

    def _write(self, *, live: bool, stopped: bool = False) -> None:
        state = "at work" if live else "stopped before its end" if stopped else "ended"
        refresh = f'<meta http-equiv="refresh" content="{_SECONDS}">' if live else ""
        rows = "".join(
            f"<tr><td>{escape(name)}</td><td>{escape(clean(self._told.get(name, 'waits')))}</td></tr>"
            for name in self._stages
        )
        models = "".join(_model(folder) for folder in dict.fromkeys(
            stage.folder for stage in self._stages.values() if stage.kind in ("immunize", "certify")))
        page = (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8">{refresh}<title>{escape(state)}: '
            f"{escape(self.path.parent.name)}</title><style>{_STYLE}</style></head><body><h1>"
            f"{escape(self.path.parent.name)}: {escape(state)}</h1><p>{time.strftime('%Y-%m-%d %H:%M:%S')}{_link(self)}"
            f"</p><table><thead><tr><th>stage</th><th></th></tr></thead><tbody>{rows}</tbody></table>{models}</body>"
            "</html>\n"
        )
        atomic_write(self.path, page)


def _link(page: ProgressPage) -> Markup:
    return Markup(' · <a href="report.html">report</a>' if (page.path.parent / "report.html").is_file() else "")


def _model(folder: Path) -> str:
    """What immunization did to the probe, and the certificate, of a model that has them by now."""
    parts = []
    try:
        outcome = ImmunizationRecord.read(folder / "immunization.json").outcome
        parts.append(f"<p>{escape(clean(outcome.told if outcome else 'immunized'))}</p>")
    except RecordError:  # not there yet
        pass
    try:
        parts.append(Certificate.read(folder / "certificate.json")._repr_html_())
    except RecordError:
        pass
    return f"<h2>{escape(folder.name)}</h2>{''.join(parts)}" if parts else ""
