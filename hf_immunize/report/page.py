"""The door of this room: folders of records in, one HTML file out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from hf_immunize.records import PROFILE_FILE, Certificate, DepthProfile, atomic_write
from hf_immunize.report import view
from hf_immunize.report.depth import probe_chart, reset_chart
from hf_immunize.report.evidence import read_evidence
from hf_immunize.report.text import clean

_JOINTS = re.compile(r"([_/.])(?=\w)")


def render_report(folders: Sequence[Path], base: Path | None, output: Path) -> Path:
    """Write the page of ``report_html`` to ``output``, which is replaced atomically."""
    return atomic_write(output, report_html(folders, base))


def report_html(folders: Sequence[Path], base: Path | None = None) -> str:
    """One self-contained page that compares a base with the immunized models in ``folders``.

    Each folder holds ``certificate.json``, the traces it certifies below ``traces/`` and, where the model was made by
    this package, ``immunization.json``. The page asks nothing of the network and runs no script.

    Args:
        folders: immunized models, in the order of the columns.
        base: the base model's folder, whose weights must be those the certificates name as control; without it they
            are not compared.

    Raises:
        RecordError: a record is missing, changed, or about another base or other data than its neighbours.
    """
    evidence = read_evidence(folders, base)
    depth = _depth_figures(base, evidence[0].certificate)
    return _environment().get_template("page.html.jinja").render(**view.page(evidence), depth=depth)


def _depth_figures(base: Path | None, certificate: Certificate) -> dict[str, Any] | None:
    """The pictures of the base's profile, which lies in its folder or that of the run; None where there is none of it.

    A profile of other weights than the certificate's control is not shown.
    """
    for folder in () if base is None else (base, base.parent):
        file = folder / PROFILE_FILE
        if not file.is_file():
            continue
        profile = DepthProfile.read(file)
        if sorted(profile.model.weights.values()) == sorted(certificate.control.weights.values()):
            return {"resets": reset_chart(profile), "probes": probe_chart(profile), "told": profile.proposal.told,
                    "rule": profile.rule.in_words()}
    return None


@cache
def _environment() -> Environment:
    """Autoescape on; invisible and control characters removed from every plain string."""

    def plain(value: Any) -> Any:
        return value if hasattr(value, "__html__") or not isinstance(value, str) else clean(value)

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=plain,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["soft"] = soft
    return environment


def soft(name: str) -> Markup:
    """A name that may break after its underscores, slashes and dots where a column is narrow."""
    return Markup(_JOINTS.sub(r"\1<wbr>", str(escape(clean(name)))))
