"""One self-contained page that compares a base with its immunized models, and pictures, drawn from records on disk."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_immunize.report.depth import depth_picture
    from hf_immunize.report.likeness import frechet_words, gap_rows
    from hf_immunize.report.page import render_report, report_html
    from hf_immunize.report.pictures import curve_pictures, picture_names

_HOMES = {
    "curve_pictures": "pictures",
    "depth_picture": "depth",
    "frechet_words": "likeness",
    "gap_rows": "likeness",
    "picture_names": "pictures",
    "render_report": "page",
    "report_html": "page",
}

__all__ = [
    "curve_pictures",
    "depth_picture",
    "frechet_words",
    "gap_rows",
    "picture_names",
    "render_report",
    "report_html",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: wording a certificate needs neither pictures nor the judge."""
    if name in _HOMES:
        return getattr(import_module(f"hf_immunize.report.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'hf_immunize.report' has no attribute {name!r}")
