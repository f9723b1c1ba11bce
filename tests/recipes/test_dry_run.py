"""``dry_run: true`` says what a run would hold in memory, and reads neither weights nor data."""

from __future__ import annotations

import pytest
import torch
from denoiser_builders import build_denoiser

from hf_immunize.errors import ModelError
from hf_immunize.stages.base import ImmunizeOptions
from hf_immunize.stages.dry_run import classifier_memory, pipeline_memory


def table(text: str) -> dict[str, list[float]]:
    lines = [line.strip("| ").split(" | ") for line in text.splitlines()]
    return {line[0]: [float(cell) for cell in line[1:]] for line in lines[2:]}


def test_a_denoisers_run_is_told_from_its_config(tmp_path):
    from diffusers import DDPMPipeline, DDPMScheduler

    from hf_immunize.training.diffusion import DiffusionImmunizationConfig

    DDPMPipeline(build_denoiser("unet"), DDPMScheduler()).save_pretrained(tmp_path / "base")
    for file in (tmp_path / "base").rglob("*.safetensors"):
        file.unlink()
    base = ImmunizeOptions(str(tmp_path / "base"), dry_run=True)
    args = DiffusionImmunizationConfig(str(tmp_path / "out"), use_cpu=True, objective="ill_only",
                                       per_device_train_batch_size=2000)
    found = table(pipeline_memory(tmp_path / "base", base, args))
    assert set(found) == {"1 device", "8, DDP", "2, FSDP2", "8, FSDP2"} and not (tmp_path / "out").exists()
    assert all(row[-2] > 0.1 for row in found.values())  # activations of 2000 rows
    with pytest.raises(ModelError, match="a pipeline with one denoiser"):
        pipeline_memory(tmp_path, base, args)


def test_a_classifiers_run_is_told_from_its_config(tmp_path, make_vit):
    from transformers import ViTImageProcessorPil

    from hf_immunize.training import ImmunizationConfig

    make_vit().save_pretrained(tmp_path / "base")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    args = ImmunizationConfig(str(tmp_path / "out"), use_cpu=True, report_to="none", per_device_train_batch_size=5000)
    base = ImmunizeOptions(str(tmp_path / "base"), dry_run=True)
    found = table(classifier_memory(tmp_path / "base", base, args))
    assert len(found) == 4 and all(row[-2] > 0.01 for row in found.values())
    assert torch.get_default_device().type == "cpu"
