"""Attacks run again from the command line: a real, tiny exam on real digits; the model is its own base."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from models import save_vit
from typer.testing import CliRunner

from hf_immunize.cli import app
from hf_immunize.records import Certificate, Interval

pytest.importorskip("sklearn", reason="the demo extra (scikit-learn), whose digits are the data, is not installed")
TASK = {"primary_dataset": "builder:digits", "harmful_dataset": "builder:digits", "primary_labels": "0,1,2",
        "harmful_labels": "5,6,7"}
SETTINGS = {"linear_probe_gd": {"steps": (100,), "learning_rate": (4.0,)},
            "ridge_probe": {"penalty": (1e-3,), "features": ("centered",)}}


@pytest.fixture(scope="module")
def sat(tmp_path_factory):
    """A folder with ``base``, ``model`` and ``task.yaml``, certified by the real exam of two attacks."""
    from hf_immunize.attacks import ATTACKS, AttackContext, load_processor, run_suite
    from hf_immunize.certification import ExamData, Protocol, build_certificate, read_task
    from hf_immunize.data import Task

    root = tmp_path_factory.mktemp("sat")
    for name in ("base", "model"):
        save_vit(root / name, seed=0)
    (root / "task.yaml").write_text(yaml.safe_dump(TASK))
    options, processor = read_task(root / "task.yaml"), load_processor(root / "base")
    primary, harmful = Task(options, "primary"), Task(options, "harmful")
    splits = {role: harmful.pixels(role, processor) for role in ("attack", "validation", "test")}
    prints = tuple(harmful.fingerprint(split, role) for role, split in splits.items())
    for name, role in (("model", "subject"), ("base", "control")):
        context = AttackContext(folder=root / name, role=role, data=prints, **splits)
        run_suite(context, ATTACKS, list(SETTINGS), (0, 1, 2), root / name, SETTINGS)
    test = primary.pixels("test", processor)
    data = ExamData(test, splits["attack"], (primary.fingerprint(test, "test"),), prints)
    protocol = Protocol(attacks=tuple(SETTINGS), seeds=(0, 1, 2))
    build_certificate(root / "model", root / "base", data, protocol).write(root / "model/certificate.json")
    return root


@pytest.fixture
def root(sat, tmp_path):
    return shutil.copytree(sat, tmp_path / "sat")


def run(root, *more, cells=2):
    done = CliRunner().invoke(app, [
        "verify", str(root / "model"), "--recheck", str(cells), "--base", str(root / "base"),
        "--task", str(root / "task.yaml"), *more])
    return done, " ".join((done.output + done.stderr).split())


def test_a_sound_certificate_holds(root):
    done, told = run(root, "--json")
    found = json.loads(done.stdout)
    lines = [item["message"] for item in found["findings"] if item["code"] == "recheck"]
    assert done.exit_code == 0 and found["ok"] and all(line.endswith("it holds.") for line in lines), told
    assert {line.split(":")[0] for line in lines} == {
        "attacked again with linear_probe_gd", "attacked again with ridge_probe"}


def test_the_command_of_the_documentation(root, monkeypatch):
    page = (Path(__file__).parents[2] / "docs/downloaded.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^hf-immunize (.*--recheck.*)$", page, re.M)
    monkeypatch.chdir(root)
    done = CliRunner().invoke(app, shlex.split(command))
    assert done.exit_code == 0 and "it holds" in done.output, done.output + done.stderr


def test_a_figure_that_was_written_in_is_found_out(root):
    path = root / "model/certificate.json"
    certificate = Certificate.read(path)
    flattering = Interval(estimate=0.5, low=0.4, high=0.6, samples=3)
    certificate.model_copy(update={
        "cells": [cell.model_copy(update={"accuracy_drop": flattering}) for cell in certificate.cells]}).write(path)
    done, told = run(root, "--recheck-seed", "1", cells=1)
    assert done.exit_code == 3 and "accuracy_drop 0, certified 0.5 (0.4 to 0.6): it does not hold here" in told


def test_what_cannot_be_attacked_again(root):
    bare = CliRunner().invoke(app, ["verify", str(root / "model"), "--recheck", "1", "--base", str(root / "base")])
    assert bare.exit_code == 1 and "expected --base and --task with --recheck" in bare.stderr
    (root / "task.yaml").write_text(yaml.safe_dump(TASK | {"split_seed": 1}))
    done, told = run(root)
    assert done.exit_code == 1 and "expected the harmful rows that the certificate names, got others" in told
    for content, message in (("primary_dataset: x", "expected harmful_dataset in"), ("tasks: 1", "got ['tasks']"),
                             ("[", "expected a task file"), ("- 1", "got list")):
        (root / "task.yaml").write_text(content)
        assert message in run(root)[1]
    (root / "task.yaml").write_text(yaml.safe_dump(TASK))
    save_vit(root / "base", seed=5)
    done, told = run(root)
    assert done.exit_code == 3 and "expected in base the base weights that the certificate names" in told
    (root / "model/model.safetensors").write_bytes(b"other")
    done, told = run(root)
    assert done.exit_code == 3 and "attacked again" not in told, "weights that were not examined were attacked"
