"""The whole diffusion job on 8x8 digits, from pretraining to the report, as a user runs it."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hf_immunize.records import Certificate

ROOT = Path(__file__).parent.parent.parent
SMOKE = ROOT / "recipes" / "mnist-diffusion" / "smoke"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_smoke_preset_runs_from_pretraining_to_the_report(tmp_path):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    words = [sys.executable, "recipes/pipeline.py", "recipes/mnist-diffusion/smoke/pipeline.yaml"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    model = tmp_path / "runs" / "mnist-diffusion-smoke" / "simulated_attack"
    certificate = Certificate.read(model / "certificate.json")
    assert certificate.utility.metric == "accuracy of a judge on drawn images" and certificate.further_utility
    assert len(certificate.trainability) == 2 and all(item.base for item in certificate.trainability)
    assert any(cell.scratch is not None for cell in certificate.cells)
    page = (model.parent / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") >= 9 and (model / "README.md").is_file()


@pytest.mark.parametrize("preset", ["", "smoke"])
def test_every_option_of_the_preset_is_one_its_recipe_knows(preset):
    """Without running a stage: option files are parsed by the very dataclasses of their recipes."""
    from hf_immunize.attacks import parse_settings
    from hf_immunize.attacks.diffusion import DIFFUSION_ATTACKS, DIFFUSION_TRAINABILITY
    from hf_immunize.exam import DIFFUSION_PROTOCOLS
    from hf_immunize.training.diffusion import DiffusionImmunizationConfig

    folder = ROOT / "recipes" / "mnist-diffusion" / preset
    stages = yaml.safe_load((folder / "pipeline.yaml").read_text(encoding="utf-8"))["stages"]
    models = [name.removeprefix("certify-") for name in stages if name.startswith("certify-")]
    assert models and {f"attack-{name}" for name in models} <= set(stages) and "attack-scratch" in stages
    for model in models:
        keys = yaml.safe_load((folder / f"{model}.yaml").read_text(encoding="utf-8"))
        DiffusionImmunizationConfig(**{name: float(value) if name.endswith("learning_rate") else value
                                       for name, value in keys.items() if name != "base_path"})
    for name, table in (("attack", DIFFUSION_ATTACKS), ("benign", DIFFUSION_TRAINABILITY)):
        keys = yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))
        assert set(parse_settings(keys["settings"], table)) <= set(table) and keys["protocol"] in DIFFUSION_PROTOCOLS


def test_the_distant_concepts_pipeline_changes_places_and_data_alone():
    """Every stage of the digits is there with the same option files, its own task and its own folders."""
    from hf_immunize.diffusion.tasks import ConceptArguments

    folder = ROOT / "recipes" / "mnist-diffusion"
    near, far = (
        yaml.safe_load((folder / name / "pipeline.yaml").read_text(encoding="utf-8")) for name in ("", "fashion")
    )
    assert set(near["stages"]) == set(far["stages"])
    for name, stage in far["stages"].items():
        assert (stage["run"], stage.get("needs")) == (near["stages"][name]["run"], near["stages"][name].get("needs"))
        files = [word for word in stage["options"].split() if word.endswith(".yaml")]
        plain = [word.replace("/fashion/task", "/task") for word in files]
        assert plain == [word for word in near["stages"][name]["options"].split() if word.endswith(".yaml")]
        assert "runs/mnist-diffusion/" not in stage["options"]
        assert name == "report" or any(f"{far['runs']}/{place}" in stage["options"] for place in near["stages"])
    ConceptArguments(**yaml.safe_load((folder / "fashion" / "task.yaml").read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", ["pipeline", "objectives", "frontier", "fashion/pipeline", "smoke/pipeline"])
def test_immunizing_stages_ask_for_settings_that_hold_together(name, monkeypatch):
    from hf_immunize.diffusion.tasks import ConceptArguments
    from hf_immunize.options import parse_options
    from hf_immunize.training.diffusion import DiffusionImmunizationConfig

    monkeypatch.chdir(ROOT)
    base = runpy.run_path(str(ROOT / "recipes" / "immunize_diffusion.py"))["BaseArguments"]
    listed = yaml.safe_load((ROOT / "recipes" / "mnist-diffusion" / f"{name}.yaml").read_text(encoding="utf-8"))
    stages = {key: stage for key, stage in listed["stages"].items() if "immunize" in stage["run"]}
    assert stages
    for key, stage in stages.items():
        words = stage["options"].split()
        _, told, config = parse_options((ConceptArguments, base, DiffusionImmunizationConfig), words)
        expected = "second_order" if config.attacker_second_order else config.objective
        assert key.split("-")[0] == expected and config.output_dir == f"{listed['runs']}/{key}"
        assert told.base_path == f"{listed['runs']}/base"
        assert any(f"{listed['runs']}/{key}" in other["options"] for place, other in listed["stages"].items()
                   if place == f"certify-{key}")


def test_what_the_quick_exam_leaves_out_is_in_the_standard_one():
    from hf_immunize.attacks import parse_settings
    from hf_immunize.attacks.diffusion import DIFFUSION_ATTACKS
    from hf_immunize.diffusion.tasks import ConceptArguments
    from hf_immunize.exam import DIFFUSION_PROTOCOLS

    folder = ROOT / "recipes" / "mnist-diffusion"
    told = {name: yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))
            for name in ("task", "attack", "attack_standard", "pipeline", "frontier", "standard")}
    more = told["attack_standard"]
    assert {*more["attacks"], *DIFFUSION_PROTOCOLS[told["attack"]["protocol"]].attacks} == set(
        DIFFUSION_PROTOCOLS[more["protocol"]].attacks)
    assert set(parse_settings(more["settings"], DIFFUSION_ATTACKS)) | {"diffusion_placeholder_token"} == set(
        more["attacks"])
    ConceptArguments(**told["task"], other_dataset=more["other_dataset"])
    assert more["exam_levels"] == told["attack"]["exam_levels"]
    stages = told["standard"]["stages"]
    attacked = {name.removeprefix("attack-").removesuffix("-standard") for name in stages if name.startswith("attack-")}
    assert attacked <= {*told["pipeline"]["stages"], *told["frontier"]["stages"]} and "base" in attacked
