"""What README and the pages that a newcomer reads next say can be done, is done."""

from __future__ import annotations

import json
import re
import runpy
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import RidgeClassifierCV
from transformers import ViTForImageClassification

import hf_immunize
from hf_immunize.cli import app
from hf_immunize.commands.verbs import STAGES
from hf_immunize.records import Certificate

ROOT = Path(__file__).parent.parent
PAGES = {name: (ROOT / name).read_text(encoding="utf-8")
         for name in ("README.md", "docs/index.md", "docs/start.md", "docs/stages.md", "docs/results.md")}  # fmt: skip
README = PAGES["README.md"]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], flags=re.S)


@pytest.mark.slow
def test_the_python_example_immunizes_as_printed(tmp_path, monkeypatch, digits_base):
    """Its own assertions say that the probe got worse and the metric held; another probe, in another way, agrees."""
    (block,) = blocks("docs/stages.md", "python")
    assert block.count("assert") == 2
    shutil.copytree(digits_base, tmp_path / "my-classifier")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    names = {"__name__": "readme"}
    exec(compile(block, "stages.md", "exec"), names)
    assert names["trainer"].outcome.immunized and names["trainer"].outcome.told.startswith("IMMUNIZED")
    harmful, primary, processor = names["harmful"], names["primary"], names["processor"]
    learn, judge, kept = (harmful.pixels("attack", processor), harmful.pixels("test", processor),
                          primary.pixels("test", processor))
    found = {}
    for folder in ("my-classifier", "immunized"):
        model = ViTForImageClassification.from_pretrained(tmp_path / folder).eval()
        with torch.no_grad():
            phi, psi = (model.vit(pixel_values=rows.pixel_values).last_hidden_state[:, 0] for rows in (learn, judge))
            right = model(pixel_values=kept.pixel_values).logits.argmax(-1) == kept.labels
        probe = RidgeClassifierCV([10.0**power for power in range(-4, 6)]).fit(phi.numpy(), learn.labels.numpy())
        found[folder] = probe.score(psi.numpy(), judge.labels.numpy()), float(right.float().mean())
    (before, kept_before), (after, kept_after) = found["my-classifier"], found["immunized"]
    assert before > 0.7 and after < before - 0.15, found  # rows that training never saw
    assert kept_after > kept_before - 0.02, found


def test_the_short_example_runs_as_printed_with_fewer_steps(tmp_path, monkeypatch, digits_base, capsys):
    """Folders of digits stand for the photos; its own assertions say that the probe got worse and accuracy held."""
    (block,), held = blocks("README.md", "python"), load_digits()
    assert block.count("assert") == 2
    for label in range(8):
        folder = tmp_path / "photos" / ("keep" if label < 5 else "harm") / str(label)
        folder.mkdir(parents=True)
        for number in np.flatnonzero(held.target == label)[:100]:
            pixels = np.round(held.images[number] * 255 / 16).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    shutil.copytree(digits_base, tmp_path / "my-classifier")
    monkeypatch.chdir(tmp_path)
    small = {"seeds": [0, 1], "attacks": ["ridge_probe"]}
    quick = {"immunize": partial(hf_immunize.immunize, max_steps=40, use_cpu=True),
             "Exam": partial(hf_immunize.Exam, attack=small, device="cpu")}
    for name, call in quick.items():
        monkeypatch.setattr(hf_immunize, name, call, raising=False)
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    found = names["made"].record
    told = found.outcome
    assert told.held_out and told.probe_after - told.chance < (told.probe_before - told.chance) / 2
    assert found.guard.drop <= found.guard.allowed
    assert names["made"].base == Path("job/original"), "its head knows the classes by name"
    assert "ridge_probe" in capsys.readouterr().out and (names["made"].folder / "immunization.json").is_file()
    assert (names["result"].folder / "report.html").is_file() and names["result"]._repr_html_().startswith("<table>")


@pytest.mark.parametrize(("page", "least"), [("README.md", 5), ("docs/index.md", 4), ("docs/start.md", 6),
                                             ("docs/stages.md", 9), ("docs/results.md", 1)])  # fmt: skip
def test_every_command_names_files_and_targets_that_exist(page, least):
    commands = [line for block in blocks(page, "bash") for line in block.splitlines()]
    assert len(commands) >= least
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    verbs = {*STAGES, *(command.name or command.callback.__name__ for command in app.registered_commands)}
    for command in commands:
        words = command.split("#")[0].split()
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, flags=re.M), command
        elif words[0] == "hf-immunize":
            assert words[1] in verbs, command
        for word in words:
            if word.startswith(("recipes/", "tests/")):
                assert (ROOT / word).exists(), command


def test_the_table_of_objectives_is_the_one_of_the_code():
    from hf_immunize.training import OBJECTIVES

    rows = re.findall(r"^\| (`.+?`) \|", (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8"), flags=re.M)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert set(OBJECTIVES) <= named, set(OBJECTIVES) - named


def test_the_readme_is_one_screen_with_the_two_commands_and_links_that_lead_somewhere():
    assert len(README.splitlines()) <= 80 and max(map(len, README.splitlines())) < 300
    assert blocks("README.md", "bash")[0].split("#")[0].split() == ["make", "demo"]
    targets = re.findall(r"\]\(([^)#\s]+)", README)
    assert len(targets) > 15
    for target in targets:
        assert target.startswith("https://") or (ROOT / target).is_file(), target
    (picture,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert (ROOT / picture).stat().st_size < 200_000


def rows(text: str) -> dict[str, list[str]]:
    found = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \|$", text, flags=re.M)
    return {name: [first, second] for name, first, second in found}


def test_the_readme_tells_the_figures_of_the_results_and_these_those_of_the_certificates():
    """Verdicts and slow-downs of the demo, as its certificates in model_cards/ have them."""
    told, whole = rows(README), rows(PAGES["docs/results.md"])
    attacks = {"linear probe, gradient descent": "linear_probe_gd", "linear probe, Adam": "linear_probe_adam",
               "linear probe, Adam on standardized features": "standardized_probe_adam", "LoRA": "lora",
               "linear probe on whitened features": "whitened_probe_gd", "ridge probe, closed form": "ridge_probe",
               "probe of earlier layers": "earlier_layer_probe", "full fine-tuning": "full_finetune",
               "full fine-tuning of the normal form": "canonical_finetune"}  # fmt: skip
    assert len(set(told) & set(attacks)) >= 4
    for name in (set(told) & set(whole)) - {"attack"}:
        assert told[name] == whole[name], name
    for place, model in enumerate(("condition_number", "closed_form_adversary")):
        certificate = Certificate.read(ROOT / "model_cards" / "digits-vit" / model / "certificate.json")
        cells = {cell.attack: cell for cell in certificate.cells}
        assert set(attacks.values()) == set(cells)
        for name, attack in attacks.items():
            text, cell = whole[name][place], cells[attack]
            assert text.replace("*", "").startswith(f"{cell.verdict}, "), (model, name)
            if cell.slow_down.estimate is not None:
                given = float(re.search(r"([\d.]+)×", text)[1])
                assert given == pytest.approx(cell.slow_down.estimate, rel=0.03), (model, name)
            elif "−" in text:
                drop = float(text.split("−")[1])
                assert drop == pytest.approx(cell.accuracy_drop.estimate, abs=0.0051), (model, name)


@pytest.mark.parametrize("backbone", ["mobilenetv2", "dinov2"])
def test_the_pages_on_photos_tell_the_figures_of_their_runs(backbone):
    """docs/vision.md has every row of docs/results/vision as the benchmark prints it, docs/results.md its range."""
    table = runpy.run_path(str(ROOT / "benchmarks" / "vision_recipe.py"))["table"]
    runs = json.loads((ROOT / "docs" / "results" / "vision" / f"{backbone}.json").read_text("utf-8"))["rows"]
    page = (ROOT / "docs" / "vision.md").read_text("utf-8")
    printed = table(runs).splitlines()
    assert len(printed) == len(runs) + 2 > 2
    for line in printed:
        assert line in page, line
    losses = sorted(row["defended"]["lost"] for row in runs)
    told = f"{losses[0]:.0f} to {losses[-1]:.0f} % of" if len(runs) > 1 else f"{losses[0]:.0f} % of"
    assert told in re.sub(r"\s+", " ", PAGES["docs/results.md"])
