"""Whole runs on two processes, under DDP and FSDP2, end where one process ends: every cell of docs/training.md."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from safetensors.torch import load_file

HERE = Path(__file__).parent
CONFIG = HERE.parents[1] / "recipes" / "accelerate" / "cpu-2-fsdp.yaml"
CELLS = ("plain", "sites", "guard", "distillation", "average", "caching", "everything", "resumed")
WAYS = ("ddp", "fsdp2", "loaded")


def run(script: Path, folder: Path, processes: int) -> None:
    """A script on one process, or on two that accelerate's launcher starts with the recipes' own file."""
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "accelerate.commands.launch", "--config_file", str(CONFIG), "--main_process_port", "0"]
    paths = os.pathsep.join([str(HERE.parent), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": paths,
    }  # fmt: skip
    words = [*launch, str(script), str(folder), str(processes)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision")
    for processes in (2, 1):  # one process finishes what two began
        run(HERE / "sharded_run.py", folder, processes)
    return folder


def differences(folder: Path) -> dict[str, float]:
    """Relative distance of all weights from one process's, by cell and way."""
    one, two = (load_file(folder / f"{processes}.safetensors") for processes in (1, 2))
    error, size = defaultdict(float), defaultdict(float)
    for name, value in two.items():
        cell, _, key = name.split("/", 2)
        truth = one[f"{cell}/one/{key}"]
        error[name.removesuffix(f"/{key}")] += float((value - truth).square().sum())
        size[name.removesuffix(f"/{key}")] += float(truth.square().sum())
    return {name: (error[name] / size[name]) ** 0.5 for name in error}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cell", CELLS)
def test_vision_weights_are_those_of_one_process(vision, cell, way):
    assert differences(vision)[f"{cell}/{way}"] <= 1e-8


def test_every_vision_cell_changes_what_is_trained(vision):
    one = load_file(vision / "1.safetensors")
    heads = {cell: one[f"{cell}/one/classifier.weight"] for cell in CELLS if cell != "resumed"}
    for first in heads:
        for second in heads:
            assert first == second or float((heads[first] - heads[second]).abs().max()) > 1e-6, (first, second)


def leaves(value, name=""):
    """(name, number or text) of everything in nested dicts and lists."""
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(part, f"{name}/{key}")
    else:
        yield name, value


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cell", CELLS)
def test_what_the_vision_trainer_tells_is_what_one_process_tells(vision, cell, way):
    """The guard's history and choice, its factor, the balance G, probes and terms before and after."""
    one, two = (json.loads((vision / f"{processes}.json").read_text()) for processes in (1, 2))
    truth, found = (dict(leaves(told)) for told in (one[f"{cell}/one"], two[f"{cell}/{way}"]))
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        expected = pytest.approx(value, rel=1e-8, abs=1e-12) if isinstance(value, float) else value
        assert found[name] == expected, name


def test_the_guard_returns_weights_of_an_evaluation_before_the_last(vision):
    told = json.loads((vision / "1.json").read_text())["guard/one"]["guard"]
    assert 0 < told["returned_step"] < 3 and told["held"] is True


def test_one_process_finishes_what_two_with_split_weights_began(vision):
    one = load_file(vision / "1.safetensors")
    for name, value in one.items():
        if name.startswith("resumed/moved/"):
            truth = one[name.replace("resumed/moved/", "everything/one/")]
            assert float((value - truth).abs().max()) <= 1e-8 * max(1.0, float(truth.abs().max())), name


@pytest.mark.parametrize("way", WAYS)
def test_saved_weights_are_whole_and_in_one_file(vision, way):
    one, two = (load_file(vision / f"{kind}-everything" / "model.safetensors") for kind in ("one", way))
    assert one.keys() == two.keys()
    assert all(float((one[name] - two[name]).abs().max()) <= 1e-8 for name in one)
    config = json.loads((vision / f"{way}-everything" / "config.json").read_text())
    assert config["architectures"] == ["ViTForImageClassification"] and "distributed_config" not in config
