"""The wheel, unpacked away from the clone, holds the main job: its verbs, and the option files they read."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run(wheel, tmp_path_factory):
    """Runs a Python program outside the clone, with the wheel's own files before everything else."""
    root = tmp_path_factory.mktemp("unpacked")
    unpacked, work = root / "unpacked", root / "work"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    work.mkdir()

    def call(*words: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(unpacked), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, *words], cwd=work, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = call("-c", "import hf_immunize; print(hf_immunize.__file__)")
    assert where.startswith(str(unpacked)), where
    return call, unpacked, work


def test_everything_of_the_clone_that_is_read_is_in_the_wheel(run):
    _, unpacked, _ = run
    for root, target, kinds in ((ROOT / "hf_immunize", "hf_immunize", (".py", ".jinja", ".css", ".typed", ".html")),
                                (ROOT / "recipes", "hf_immunize/presets", (".py", ".yaml", ".json", ".md"))):
        files = {path.relative_to(root) for path in root.rglob("*") if path.suffix in kinds or path.name == "py.typed"}
        assert len(files) > 20
        missing = {path for path in files if not (unpacked / target / path).is_file()}
        assert not missing
    assert {path.name for path in unpacked.iterdir() if path.suffix != ".dist-info"} == {"hf_immunize"}


def test_presets_are_listed_and_copied_and_their_script_runs(run):
    call, _, work = run
    shown = call("-m", "hf_immunize.cli", "recipes")
    assert "digits-vit: attack.yaml" in shown and "smoke/run.yaml" in shown and "accelerate" not in shown
    call("-m", "hf_immunize.cli", "recipes", "--copy", ".", "digits-vit")
    names = {path.name for path in (work / "recipes").iterdir() if path.is_dir()}
    assert names == {"digits-vit", "accelerate"}
    assert (work / "recipes" / "digits-vit" / "vit" / "config.json").read_bytes() == (
        ROOT / "recipes" / "digits-vit" / "vit" / "config.json").read_bytes()
    assert "lora.rank=8" in call("recipes/attack.py", "--describe")


@pytest.mark.slow
def test_a_stage_explains_its_options(run):
    call, _, _ = run
    shown = call("-m", "hf_immunize.cli", "immunize", "--help")
    assert "usage: hf-immunize immunize" in shown and "--objective" in shown and "--primary_dataset" in shown
