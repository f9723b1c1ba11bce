"""recipes/attack.py and recipes/certify.py as a user runs them, on real digits and a tiny untrained model."""

import runpy
import sys
from pathlib import Path

import pytest
from transformers import ViTImageProcessorPil

from hf_immunize.errors import ConfigError
from hf_immunize.records import Certificate

RECIPES = Path(__file__).parents[2] / "recipes"
TASK = ["--config", str(RECIPES.parent / "tests" / "digits.yaml")]
SMALL = [
    "--attacks", "linear_probe_gd", "ridge_probe", "--seeds", "0", "1", "--device", "cpu",
    "--settings", "linear_probe_gd.steps=50", "linear_probe_gd.learning_rate=4,16", "ridge_probe.penalty=1e-3",
]


@pytest.fixture
def models(tmp_path, make_vit):
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    for name, seed in (("base", 0), ("immunized", 1)):
        make_vit(labels=5, seed=seed).save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    return tmp_path


def run(recipe, *words):
    return runpy.run_path(str(RECIPES / f"{recipe}.py"))["main"](list(words))


def test_attack_twice_and_certify(models, capsys):
    for name, role in (("base", "control"), ("immunized", "subject")):
        words = [*TASK, *SMALL, "--model_path", str(models / name), "--role", role]
        run("attack", *words)
        assert "8 runs made, 0 kept from before, 0 diverged" in capsys.readouterr().out
        run("attack", *words)
        assert "0 runs made, 8 kept from before" in capsys.readouterr().out
    run("certify", *TASK, "--model_path", str(models / "immunized"), "--base_path", str(models / "base"),
        "--device", "cpu")
    shown = capsys.readouterr().out
    certificate = Certificate.read(models / "immunized" / "certificate.json")
    assert {cell.attack: cell.verdict for cell in certificate.cells}["lora"] == "NOT RUN"
    assert "NOT RUN" in shown and "certificate.json" in shown and "does not certify" in shown
    card = (models / "immunized" / "README.md").read_text()
    assert certificate.overall in card
    assert not any(str(models) in file.read_text() for file in (models / "immunized").rglob("*.json"))


@pytest.mark.slow
def test_a_benign_task_and_a_public_base(models, capsys):
    """The third task is learned on both sides; attackers who hold the base and benign data run."""
    third = [*TASK, "--benign_dataset", "builder:digits", "--benign_labels", "0,1,2"]
    few = ["--seeds", "0", "1", "--device", "cpu", "--tuning_seeds", "0", "--trials", "0"]
    benign = [*few, "--task", "benign", "--settings", "benign_probe.steps=20", "benign_probe.learning_rate=0.1",
              *(f"benign_{name}.{option}" for name in ("lora", "full_finetune")
                for option in ("steps=2", "learning_rate=1e-3"))]
    harmful = [*few, "--attacks", "ridge_probe", "fold_linear_map", "mixed_finetune", "--base_path",
               str(models / "base"), "--settings", "fold_linear_map.steps=20", "mixed_finetune.steps=2",
               "mixed_finetune.learning_rate=1e-3", "ridge_probe.penalty=1e-3", "fold_linear_map.learning_rate=4"]
    for name, role in (("base", "control"), ("immunized", "subject")):
        for words in (benign, harmful):
            run("attack", *third, *words, "--model_path", str(models / name), "--role", role)
            assert "6 runs made" in capsys.readouterr().out or words is harmful
    run("certify", *third, "--model_path", str(models / "immunized"), "--base_path", str(models / "base"),
        "--device", "cpu")
    shown = capsys.readouterr().out
    certificate = Certificate.read(models / "immunized" / "certificate.json")
    assert "benign trainability, lora" in shown and len(certificate.trainability) == 3
    cells = {cell.attack: cell for cell in certificate.cells}
    assert cells["fold_linear_map"].subject and cells["mixed_finetune"].subject
    run("certify", *third, "--model_path", str(models / "immunized"), "--base_path", str(models / "base"),
        "--device", "cpu", "--recheck", "9")
    assert "DOES NOT AGREE" not in capsys.readouterr().out
    with pytest.raises(ConfigError, match="expected task harmful or benign, got 'other'"):
        run("attack", *third, "--task", "other", "--model_path", str(models / "base"))


def test_yaml_of_the_demo_parses_and_plans(models, capsys):
    run("attack", "--describe")
    described = capsys.readouterr().out
    assert "lora.rank=8" in described and "linear_probe_gd.learning_rate=0.1,1,4" in described
    with pytest.raises(ConfigError, match="expected a protocol in .*got 'hasty'"):
        run("attack", *TASK, "--config", str(RECIPES / "digits-vit" / "attack.yaml"), "--model_path",
            str(models / "base"), "--protocol", "hasty")


def test_help_explains_every_option(capsys):
    for recipe in ("attack", "certify"):
        with pytest.raises(SystemExit):
            run(recipe, "--help")
        shown = capsys.readouterr().out
        assert "--model_path" in shown and "--protocol" in shown and "--harmful_labels" in shown


def test_errors_are_one_line_for_a_user(models, monkeypatch):
    words = [*TASK, "--model_path", str(models / "immunized"), "--base_path", str(models / "nowhere")]
    monkeypatch.setattr(sys, "argv", ["certify.py", *words, "--device", "cpu"])
    with pytest.raises(SystemExit, match="^IncompleteExamError: expected the un-immunized base model"):
        runpy.run_path(str(RECIPES / "certify.py"), run_name="__main__")
