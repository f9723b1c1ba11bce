"""What README says can be done, is done."""

from __future__ import annotations

import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import RidgeClassifierCV
from transformers import ViTForImageClassification

import hf_immunize

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


def test_the_python_example_immunizes_as_printed(tmp_path, monkeypatch, digits_base):
    """Its own assertions say that the probe got worse and the metric held; another probe, in another way, agrees."""
    block, _ = BLOCKS
    assert block.count("assert") == 2
    shutil.copytree(digits_base, tmp_path / "my-classifier")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    names = {"__name__": "readme"}
    exec(compile(block, "README.md", "exec"), names)
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
    """Folders of digits stand for the photos; how the result looks is what the page says."""
    (_, block), held = BLOCKS, load_digits()
    for label in range(8):
        folder = tmp_path / "photos" / ("keep" if label < 5 else "harm") / str(label)
        folder.mkdir(parents=True)
        for number in np.flatnonzero(held.target == label)[:30]:
            pixels = np.round(held.images[number] * 255 / 16).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    shutil.copytree(digits_base, tmp_path / "my-classifier")
    monkeypatch.chdir(tmp_path)
    small = {"seeds": [0, 1], "attacks": ["ridge_probe"]}
    quick = {"immunize": partial(hf_immunize.immunize, max_steps=2, use_cpu=True),
             "Exam": partial(hf_immunize.Exam, attack=small, device="cpu")}
    for name, call in quick.items():
        monkeypatch.setattr(hf_immunize, name, call, raising=False)
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["made"].base == Path("job/original"), "its head knows the classes by name"
    assert "ridge_probe" in capsys.readouterr().out and (names["made"].folder / "immunization.json").is_file()
    assert (names["result"].folder / "report.html").is_file() and names["result"]._repr_html_().startswith("<table>")


def test_every_command_names_files_and_targets_that_exist():
    commands = [line for block in re.findall(r"```bash\n(.*?)```", README, flags=re.S) for line in block.splitlines()]
    assert len(commands) >= 6
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in commands:
        words = command.split("#")[0].split()
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, flags=re.M), command
        for word in words:
            if word.startswith("recipes/"):
                assert (ROOT / word).is_file(), command


def test_the_table_of_objectives_is_the_one_of_the_code():
    from hf_immunize.training import OBJECTIVES

    named = set(re.findall(r"^\| `(\w+)` \|", README, flags=re.M))
    assert named == set(OBJECTIVES)
