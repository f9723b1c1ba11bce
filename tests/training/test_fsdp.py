"""Whole runs on two processes, under DDP and FSDP2, end where one process ends: every cell of docs/training.md."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from launching import run_script
from safetensors.torch import load_file
from transformers import ViTForImageClassification

HERE = Path(__file__).parent
CELLS = {
    "vision": ("plain", "sites", "guard", "distillation", "average", "attack", "caching", "everything", "resumed"),
    "diffusion": (
        "plain", "unet", "guard", "distillation", "average", "factors", "attack", "attack, factors", "attack, both",
        "imma", "everything", "resumed",
    ),
}
pytestmark = pytest.mark.slow  # minutes of two processes each; test_distributed.py runs DDP every time

SCRIPTS = {"vision": HERE / "sharded_run.py", "diffusion": HERE / "diffusion" / "sharded_diffusion.py"}
WAYS = {"vision": ("ddp", "fsdp2", "asked", "loaded"), "diffusion": ("ddp", "fsdp2")}
REFUSED = {("vision", "attack", "loaded")}
"""The attacker trains a copy, and what was split at loading cannot be copied (test_devices.py)."""
EACH = [
    (trainer, cell, way) for trainer, cells in CELLS.items() for cell in cells for way in WAYS[trainer]
    if (trainer, cell, way) not in REFUSED
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Both scripts on two processes, then on one, which finishes what the two began."""
    found = {trainer: tmp_path_factory.mktemp(trainer) for trainer in SCRIPTS}
    for trainer, folder in found.items():
        for processes in (2, 1):
            config = "cpu-2-fsdp" if processes == 2 else None
            run_script(SCRIPTS[trainer], str(folder), str(processes), config=config)
    return found


@pytest.fixture(scope="module")
def weights(folders):
    """By trainer and number of processes, all weights under ``cell/way/name``."""
    return {(t, n): load_file(folder / f"{n}.safetensors") for t, folder in folders.items() for n in (1, 2)}


def distance(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor], start: str, other: str) -> float:
    """Relative distance of all weights under two names."""
    error = size = 0.0
    for name, value in truth.items():
        if name.startswith(other):
            error += float((found[start + name.removeprefix(other)] - value).square().sum())
            size += float(value.square().sum())
    assert size > 0
    return (error / size) ** 0.5


@pytest.mark.parametrize("trainer,cell,way", EACH)
def test_two_processes_end_at_the_weights_of_one(weights, trainer, cell, way):
    one, two = weights[trainer, 1], weights[trainer, 2]
    assert distance(two, one, f"{cell}/{way}/", f"{cell}/one/") <= 1e-8


def leaves(value, name=""):
    """(name, number or text) of everything in nested dicts and lists."""
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(part, f"{name}/{key}")
    else:
        yield name, value


@pytest.mark.parametrize("trainer,cell,way", EACH)
def test_two_processes_tell_what_one_tells(folders, trainer, cell, way):
    """The guard's history and choice, its factor, the balance G, probes and terms before and after, the log."""
    one, two = (json.loads((folders[trainer] / f"{processes}.json").read_text()) for processes in (1, 2))
    truth, found = (dict(leaves(told)) for told in (one[f"{cell}/one"], two[f"{cell}/{way}"]))
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        expected = pytest.approx(value, rel=1e-8, abs=1e-10) if isinstance(value, float) else value
        assert found[name] == expected, name


@pytest.mark.parametrize("trainer", SCRIPTS)
def test_every_cell_ends_at_weights_of_its_own(weights, trainer):
    one = weights[trainer, 1]
    cells = {cell: {n for n in one if n.startswith(f"{cell}/one/")} for cell in CELLS[trainer] if cell != "resumed"}
    for first, names in cells.items():
        for second, others in cells.items():
            if first < second and len(names) == len(others):  # of one architecture
                assert distance(one, one, f"{first}/one/", f"{second}/one/") > 1e-7, (first, second)


@pytest.mark.parametrize("trainer", SCRIPTS)
def test_the_guard_returns_weights_of_an_evaluation_before_the_last(folders, trainer):
    told = json.loads((folders[trainer] / "1.json").read_text())["guard/one"]["guard"]
    assert told["returned_step"] < 3 and told["held"] is True


@pytest.mark.parametrize("trainer", SCRIPTS)
def test_one_process_finishes_what_two_with_split_weights_began(weights, trainer):
    one = weights[trainer, 1]
    assert distance(one, one, "resumed/moved/", "everything/one/") <= 1e-8


@pytest.mark.parametrize("way", WAYS["vision"])
def test_saved_image_models_are_whole(folders, way):
    folder = folders["vision"] / f"{way}-everything"
    told = json.loads((folder / "config.json").read_text())
    assert told["architectures"] == ["ViTForImageClassification"] and "distributed_config" not in told
    one, two = (
        ViTForImageClassification.from_pretrained(folders["vision"] / f"{kind}-everything", use_safetensors=True)
        for kind in ("one", way)
    )
    assert two.dtype == torch.float64
    assert distance(two.state_dict(), one.state_dict(), "", "") <= 1e-8


@pytest.mark.parametrize("way", WAYS["diffusion"])
def test_saved_denoisers_are_whole(folders, way):
    one, two = (
        load_file(folders["diffusion"] / f"{kind}-released" / "diffusion_pytorch_model.safetensors")
        for kind in ("one", way)
    )
    assert one.keys() == two.keys() and distance(two, one, "", "") <= 1e-8


def test_the_table_of_cells_names_these_tests():
    page = (HERE.parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    named = {
        f"{start}{way}" for start, ways in re.findall(r"`((?:vision|diffusion)-[^`]+-)` ([a-z0-9, ]+)", page)
        for way in ways.strip().split(", ")
    }  # fmt: skip
    assert named == {"-".join(cell) for cell in EACH}
