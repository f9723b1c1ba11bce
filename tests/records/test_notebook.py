"""Certificates in notebooks: failures first, and nothing that a name could run."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import record_builders as build

from hf_immunize.records import Certificate


def test_a_certificate_shows_its_verdicts_failures_first(tmp_path):
    certificate = Certificate.read(build.exam_folder(tmp_path) / "certificate.json")
    shown = certificate._repr_html_()
    assert all(f"<td>{cell.attack}</td>" in shown for cell in certificate.cells)
    assert f"<b>{certificate.overall}</b>" in shown and certificate.expires in shown
    order = [shown.index(f"<td>{name}</td>") for name in ("ridge_probe", "full_finetune", "linear_probe_adam")]
    assert order == sorted(order)


def test_names_bring_no_markup(tmp_path):
    certificate = Certificate.read(build.exam_folder(tmp_path) / "certificate.json")
    subject = certificate.subject.model_copy(update={"name": "<script>alert(1)</script>\x1b[31m"})
    shown = certificate.model_copy(update={"subject": subject})._repr_html_()
    assert "<script>" not in shown and "\x1b" not in shown and "&lt;script&gt;" in shown
