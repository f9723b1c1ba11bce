"""Every recipe parses, helps, and its stages name files that exist."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import launching
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from hf_immunize.records import ImmunizationRecord
from hf_immunize.stages.checks.options import refuse_bad_options
from hf_immunize.stages.workflow.run_file import RunFile
from hf_immunize.stages.workflow.stages import make_stages

ROOT = Path(__file__).parent.parent.parent
RECIPES = ROOT / "recipes"
RUNS = sorted(path for path in RECIPES.rglob("*.yaml") if "\nimmunize:" in path.read_text(encoding="utf-8"))
SCRIPTS = sorted(path for path in RECIPES.glob("*.py"))


def test_the_folder_has_not_moved():
    assert len(RUNS) >= 9 and len(SCRIPTS) >= 6


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.relative_to(RECIPES).as_posix())
def test_every_run_file_names_existing_files_and_options_that_its_stages_know(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    run = RunFile.read(path)
    stages = make_stages(run)
    refuse_bad_options(run, stages)
    assert run.hardware is None or (ROOT / run.hardware).is_file()
    for stage in stages.values():
        for value in stage.options.values():
            if isinstance(value, str) and value.startswith("recipes/"):
                assert (ROOT / value).exists(), value


@pytest.mark.parametrize("name", [pytest.param("pretrain.py", marks=pytest.mark.slow), "immunize.py"])
def test_help_explains_every_option(name):
    done = subprocess.run([sys.executable, str(RECIPES / name), "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "--primary_dataset" in done.stdout and "--config" in done.stdout
    if name == "immunize.py":
        for option in ("--objective", "--strength", "--max_primary_drop", "--horizon", "--distillation"):
            assert option in done.stdout


@pytest.mark.slow
def test_a_task_of_another_base_a_second_run_and_a_changed_run(tmp_path):
    """immunize.py on a tiny base: refuses a wrong head, finishes, says so when asked again, never mixes two runs."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        num_labels=5,
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "base")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "base")

    def immunize(*extra: str) -> subprocess.CompletedProcess:
        words = [
            sys.executable, str(RECIPES / "immunize.py"), "--config", str(RECIPES.parent / "tests" / "digits.yaml"),
            "--base_path", str(tmp_path / "base"), "--output_dir", str(tmp_path / "out"), "--max_steps", "2",
            "--per_device_harmful_batch_size", "20", "--use_cpu", "--report_to", "none", *extra,
        ]
        return subprocess.run(words, capture_output=True, text=True, cwd=ROOT)

    wrong = immunize("--primary_labels", "0,1,2")
    assert wrong.returncode != 0 and "expected a base with 3 labels, got 5" in wrong.stderr
    refused = immunize("--per_device_harmful_batch_size", "3")
    assert refused.returncode != 0 and "raise per_device_harmful_batch_size" in refused.stderr
    first = immunize()  # corrected, in the same folder
    assert first.returncode == 0, first.stderr
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "preprocessor_config.json", "immunization.json", "run.json"} <= names
    assert not [name for name in names if name.startswith("checkpoint") or name.endswith(".bin")]
    required = immunize("--require", "--output_dir", str(tmp_path / "required"), "--learning_rate", "1e-9")
    assert required.returncode != 0 and "NotImmunizedError: expected an immunized model" in required.stderr
    assert "NOT IMMUNIZED" in required.stderr and (tmp_path / "required" / "immunization.json").is_file()
    again = immunize()
    assert again.returncode == 0 and "already immunized" in again.stdout
    other = immunize("--strength", "0.7")
    assert other.returncode != 0 and "RunMismatchError" in other.stderr and "options" in other.stderr


@pytest.mark.slow
def test_a_head_trained_on_cached_features_is_that_of_images_and_pickles_are_not_read(tmp_path):
    """pretrain.py: the head alone on a tiny network with BatchNorm, with and without cache_frozen_features."""
    from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessorPil

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=7, layer_type="basic")
    ResNetForImageClassification(config).save_pretrained(tmp_path / "base")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "base")

    def pretrain(base: str, *extra: str) -> subprocess.CompletedProcess:
        words = [
            sys.executable, str(RECIPES / "pretrain.py"), "--config", str(RECIPES.parent / "tests" / "digits.yaml"),
            "--model_name_or_path", str(tmp_path / base), "--trainable_modules", "classifier", "--max_steps", "4",
            "--learning_rate", "0.01", "--use_cpu", "--report_to", "none", *extra,
        ]
        environment = {**os.environ, "HF_IMMUNIZE_CACHE": str(tmp_path / "cache")}
        return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment)

    for name, extra in (("plain", ()), ("cached", ("--cache_frozen_features", "true"))):
        done = pretrain("base", "--output_dir", str(tmp_path / name), *extra)
        assert done.returncode == 0 and "validation accuracy" in done.stdout, done.stderr
    plain, cached, before = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "cached", "base"))
    assert any((tmp_path / "cache" / "features").iterdir())
    for name, value in plain.items():
        torch.testing.assert_close(cached[name], value, rtol=1e-4, atol=1e-6)
        if not name.startswith("classifier"):
            assert torch.equal(value, before[name]), name
    assert plain["classifier.1.weight"].shape == (5, 8)
    torch.save(before, tmp_path / "base" / "pytorch_model.bin")
    (tmp_path / "base" / "model.safetensors").unlink()
    refused = pretrain("base", "--output_dir", str(tmp_path / "pickle"))
    assert refused.returncode != 0 and refused.stderr.splitlines()[-1].startswith("ModelError: expected an image model")


def test_two_cpu_processes_run_through_accelerate_launch(tmp_path):
    script = tmp_path / "count.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom accelerate import PartialState\nstate = PartialState(cpu=True)\n"
        "Path(sys.argv[1], f'rank{state.process_index}').write_text(str(state.num_processes))\n"
        "from launching import leave\nleave()\n"
    )
    launching.run_script(script, str(tmp_path), config="cpu-2")
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == ["2", "2"]


@pytest.mark.slow
def test_immunization_during_pretraining_starts_from_a_config_alone(tmp_path):
    """from_scratch: no weights are read, none of theta_0's options is accepted, the record says what the start was."""
    config = ["--config", str(RECIPES.parent / "tests" / "digits.yaml"), "--config",
              str(RECIPES / "digits-vit" / "pretrain_immunized.yaml")]  # fmt: skip

    def immunize(*extra: str) -> subprocess.CompletedProcess:
        words = [
            sys.executable, str(RECIPES / "immunize.py"), *config, "--output_dir", str(tmp_path / "out"),
            "--max_steps", "3", "--eval_steps", "3", "--logging_steps", "1", "--report_to", "none", *extra,
        ]  # fmt: skip
        return subprocess.run(words, capture_output=True, text=True, cwd=ROOT)

    refused = immunize("--distillation", "1", "--max_primary_drop", "1")
    assert refused.returncode != 0
    assert "expected no distillation, no max_primary_drop with from_scratch" in refused.stderr
    done = immunize()
    assert done.returncode == 0, done.stderr
    record = ImmunizationRecord.read(tmp_path / "out" / "immunization.json")
    assert record.base.weights == {} and record.base.name == "vit architecture, random weights"
    assert record.steps == 3 and "'harmful_adversary_r2'" in done.stdout + done.stderr
    saved = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert saved.config.id2label == {0: "0", 1: "1", 2: "2", 3: "3", 4: "4"}
