"""The notebooks of docs/: what they store is whole, small and of no machine; with -m slow they are executed."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def cells(path: Path, kind: str) -> list[dict]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def outputs(path: Path) -> str:
    """Whatever the cells printed and gave, as one text."""
    found = [part.get("text") or part.get("data", {}).get("text/html") or part.get("data", {}).get("text/plain", "")
             for cell in cells(path, "code") for part in cell["outputs"]]
    return "\n".join("".join(part) for part in found)


def test_there_are_two():
    assert {path.stem for path in NOTEBOOKS} == {"immunize_your_classifier", "examine_a_model"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_stored_is_whole_small_and_of_no_machine(path):
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1)), "make notebooks"
    assert not [part for cell in code for part in cell["outputs"] if part["output_type"] == "error"]
    assert path.stat().st_size < 300_000
    assert not re.search(r"/(tmp|home|root|Users|work)/|\d{4}-\d\d-\d\dT\d\d:\d\d", outputs(path))
    assert sum("assert" in "".join(cell["source"]) for cell in code) >= 1
    told = "".join("".join(cell["source"]) for cell in cells(path, "markdown"))
    for link in re.findall(r"\]\(([^)#\s]+)\)", told):
        assert (path.parent / link).is_file(), link


def test_what_is_stored_says_what_the_text_says():
    by_name = {path.stem: outputs(path) for path in NOTEBOOKS}
    made = by_name["immunize_your_classifier"]
    assert "IMMUNIZED: harmful_adversary_r2" in made
    (before, after) = re.findall(r"'harmful probe': ([\d.]+)", made.split("IMMUNIZED")[1])
    assert float(after) < float(before) - 15
    examined = by_name["examine_a_model"]
    verdicts = dict(re.findall(r"<tr><td>(\w+)</td><td>[\w ]+</td><td[^>]*>([A-Z ]+)</td>", examined))
    assert verdicts["ridge_probe"] == verdicts["standardized_probe_adam"] == "FAILS" != verdicts["linear_probe_gd"]
    assert "'FAILS'" in examined and "srcdoc=" in examined


@pytest.mark.slow
def test_they_run_in_a_kernel_of_their_own():
    if importlib.util.find_spec("nbclient") is None:
        pytest.skip("nbclient is not installed: pip install hf_immunize[docs]")
    done = subprocess.run([sys.executable, str(ROOT / "docs" / "tools" / "notebooks.py"), "--check"],
                          capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(" cells") == len(NOTEBOOKS)
