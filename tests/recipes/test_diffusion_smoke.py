"""The whole diffusion job on 8x8 digits, from pretraining to the report, as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hf_immunize.records import Certificate
from hf_immunize.stages.checks.options import refuse_bad_options
from hf_immunize.stages.workflow.run_file import RunFile
from hf_immunize.stages.workflow.stages import make_stages

ROOT = Path(__file__).parent.parent.parent
SMOKE = ROOT / "recipes" / "mnist-diffusion" / "smoke"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_smoke_preset_runs_from_pretraining_to_the_report(tmp_path):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    words = [sys.executable, "-m", "hf_immunize.cli", "run", "recipes/mnist-diffusion/smoke/run.yaml"]
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
def test_every_option_of_the_preset_is_one_its_recipe_knows(preset, monkeypatch):
    """Without running a stage: option files are parsed by the very dataclasses of their recipes."""
    from hf_immunize.attacks import parse_settings
    from hf_immunize.attacks.diffusion import DIFFUSION_ATTACKS, DIFFUSION_TRAINABILITY
    from hf_immunize.exam import DIFFUSION_PROTOCOLS
    from hf_immunize.training.diffusion import DiffusionImmunizationConfig

    folder = ROOT / "recipes" / "mnist-diffusion" / preset
    monkeypatch.chdir(ROOT)
    run = RunFile.read(folder / "run.yaml")
    stages = make_stages(run)
    assert run.models and {f"attack-{name}" for name in run.models} <= set(stages) and "attack-scratch" in stages
    for model in run.models:
        keys = yaml.safe_load((folder / f"{model}.yaml").read_text(encoding="utf-8"))
        DiffusionImmunizationConfig(**{name: float(value) if name.endswith("learning_rate") else value
                                       for name, value in keys.items() if name != "base_path"})
    for name, table in (("attack", DIFFUSION_ATTACKS), ("benign", DIFFUSION_TRAINABILITY)):
        keys = yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))
        assert set(parse_settings(keys["settings"], table)) <= set(table) and keys["protocol"] in DIFFUSION_PROTOCOLS


def test_the_distant_concepts_run_changes_data_and_room_for_classes_alone(monkeypatch):
    """Every stage of the digits is there with the same options, but for its own task and its own folders."""
    from hf_immunize.diffusion.tasks import ConceptArguments

    monkeypatch.chdir(ROOT)
    near, far = (RunFile.read(f"recipes/mnist-diffusion/{name}run.yaml") for name in ("", "fashion/"))
    stages, others = make_stages(near), make_stages(far)
    assert set(stages) == set(others)
    for name, stage in others.items():
        plain = {key: str(value).replace("mnist-diffusion-fashion", "mnist-diffusion")
                 for key, value in stage.options.items() if key not in far.task}
        wanted = {key: str(value) for key, value in stages[name].options.items() if key not in near.task}
        assert plain == wanted | ({"num_classes": "20"} if name == "base" else {})
        assert not [value for value in stage.options.values() if str(value).startswith("runs/mnist-diffusion/")]
    ConceptArguments(**far.task)


@pytest.mark.parametrize("name", ["run", "objectives", "frontier", "standard", "fashion/run", "fashion/objectives",
                                  "smoke/run"])
def test_stages_ask_for_settings_that_hold_together(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    run = RunFile.read(f"recipes/mnist-diffusion/{name}.yaml")
    stages = make_stages(run)
    parsed = refuse_bad_options(run, stages)
    for key, section in run.models.items():
        if section is not None:
            _, told, config = parsed[key]
            expected = "second_order" if config.attacker_second_order else config.objective
            assert key.split("-")[0] == expected and config.output_dir == f"{run.output_dir}/{key}"
            assert told.base_path == f"{run.output_dir}/base"
        judged = parsed[f"certify-{key}"][1]
        assert judged.judge_path == f"{run.output_dir}/judge" and judged.model_path == f"{run.output_dir}/{key}"


def test_what_the_quick_exam_leaves_out_is_in_the_standard_one():
    from hf_immunize.attacks import parse_settings
    from hf_immunize.attacks.diffusion import DIFFUSION_ATTACKS
    from hf_immunize.diffusion.tasks import ConceptArguments
    from hf_immunize.exam import DIFFUSION_PROTOCOLS

    folder = ROOT / "recipes" / "mnist-diffusion"
    told = {name: yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))
            for name in ("task", "attack", "attack_standard", "run", "frontier", "standard")}
    more = told["attack_standard"]
    assert {*more["attacks"], *DIFFUSION_PROTOCOLS[told["attack"]["protocol"]].attacks} == set(
        DIFFUSION_PROTOCOLS[more["protocol"]].attacks)
    assert set(parse_settings(more["settings"], DIFFUSION_ATTACKS)) | {"diffusion_placeholder_token"} == set(
        more["attacks"])
    ConceptArguments(**told["task"], other_dataset=more["other_dataset"])
    assert more["exam_levels"] == told["attack"]["exam_levels"]
    attacked = told["standard"]["immunize"]
    assert set(attacked) <= {*told["run"]["immunize"], *told["frontier"]["immunize"]} and not any(attacked.values())
