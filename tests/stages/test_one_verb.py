"""The main job of a small denoiser through the verbs of the package, which find the family by the task alone."""

from __future__ import annotations

import json

import pytest

from hf_immunize.errors import RunMismatchError
from hf_immunize.records import AttackTrace, Certificate, ImmunizationRecord
from hf_immunize.stages import attack, certify, immunize, pretrain

TASK = ["--dataset=builder:digits", "--image_size=8", "--rows_per_class=20"]
SMALL = ["--seeds", "0", "1", "--trials=0", "--tuning_seeds=0", "--exam_levels=2", "--pictures=0", "--device=cpu",
         "--attacks", "diffusion_full_finetune", "--settings", "diffusion_full_finetune.steps=2",
         "diffusion_full_finetune.learning_rate=1e-3", "diffusion_full_finetune.batch_size=4"]


@pytest.mark.slow
def test_from_pretraining_to_a_certificate(tmp_path, capsys):
    base, model = tmp_path / "base", tmp_path / "model"
    small = ["--block_channels=8,8", "--max_steps=2", "--batch_size=4", "--device=cpu", f"--output_dir={base}"]
    pretrain.main([*TASK, *small])
    assert "retain denoising loss" in capsys.readouterr().out
    pretrain.main([*TASK, *small])
    assert "already trained" in capsys.readouterr().out
    with pytest.raises(RunMismatchError, match="differs in"):
        pretrain.main([*TASK, *small, "--seed=5"])
    immunize.main([*TASK, f"--base_path={base}", f"--output_dir={model}", "--objective=ill_only", "--max_steps=1",
                   "--per_device_train_batch_size=4", "--per_device_harmful_batch_size=8", "--learning_rate=1e-4",
                   "--max_loss_factor=100", "--use_cpu=true", "--disable_progress=true"])
    record = ImmunizationRecord.read(model / "immunization.json")
    assert record.base.name == "base" and {found.role for found in record.data} == {
        "retain train", "retain validation", "harmful defense"}
    assert json.loads((model / "run.json").read_text())["stage"] == "immunize_diffusion"
    for folder, role in ((base, "control"), (model, "subject")):
        attack.main([*TASK, f"--model_path={folder}", f"--role={role}", *SMALL])
        assert "2 runs made, 0 kept from before" in capsys.readouterr().out
    certify.main([*TASK, f"--model_path={model}", f"--base_path={base}", "--device=cpu", "--draw_steps=2",
                  "--judged_images=4"])
    certificate = Certificate.read(model / "certificate.json")
    told = {cell.attack: cell.subject is not None for cell in certificate.cells}
    assert told["diffusion_full_finetune"] and not told["diffusion_lora"]
    assert {path.parent.name for path in model.rglob("traces/*/*.json")} == {"subject", "control"}
    assert AttackTrace.read(next((base / "traces" / "control").iterdir())).role == "control"
