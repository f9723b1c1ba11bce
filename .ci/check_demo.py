"""Check what the demo left behind: ``python .ci/check_demo.py runs/digits-vit-smoke``; fails if something is amiss."""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_immunize.hub import verify_folder
from hf_immunize.records import AttackTrace, Certificate, ImmunizationRecord

MODELS = ("condition_number", "closed_form_adversary")


def check(runs: Path) -> None:
    """Every promised file is there, valid, and loads."""
    assert (runs / "report.html").stat().st_size > 10_000, "report.html is missing or empty"
    for name in ("base", *MODELS):
        AutoModelForImageClassification.from_pretrained(runs / name)
        AutoImageProcessor.from_pretrained(runs / name, backend="pil")
        pickles = [path for path in (runs / name).rglob("*") if path.suffix in {".bin", ".pt", ".pth", ".pkl"}]
        assert not pickles, f"pickles left in {name}: {pickles}"
    base = Certificate.read(runs / MODELS[0] / "certificate.json").control
    for name in MODELS:
        folder = runs / name
        record = ImmunizationRecord.read(folder / "immunization.json")
        certificate = Certificate.read(folder / "certificate.json")
        assert certificate.subject.weights == record.model.weights, f"{name}: another model was certified"
        assert certificate.control == base, f"{name}: another base"
        traces = [AttackTrace.read(path) for path in sorted((folder / "traces" / "subject").glob("*.json"))]
        assert {trace.attack for trace in traces} == {cell.attack for cell in certificate.cells}, name
        assert not [cell for cell in certificate.cells if cell.verdict == "NOT RUN"], f"{name}: cells were not run"
        assert (folder / "README.md").read_text(encoding="utf-8").startswith("---"), f"{name}: no model card"
        result = verify_folder(folder)
        assert result.ok, f"{name}: {result}"
        print(f"{name}: {len(traces)} traces, overall {certificate.overall}")


if __name__ == "__main__":
    check(Path(sys.argv[1]))
