"""Tiny real models with random weights, saved and certified by synthetic records: they exercise loading, no claim."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import record_builders as build
import torch
from published import EXPIRES, RESISTING, provenance
from rejudged import judge_again
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil, ViTModel

from hf_immunize.records import ModelFingerprint, loading_files


def tiny_config() -> ViTConfig:
    return ViTConfig(image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                     intermediate_size=16, num_labels=3)


def save_vit(folder: Path, seed: int, kind=ViTForImageClassification, **saving) -> Path:
    torch.manual_seed(seed)
    kind(tiny_config()).save_pretrained(folder, **saving)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


def certify(folder: Path, base: Path, name: str, architecture: str) -> Path:
    """Records over the weights that lie in ``folder`` and ``base``."""
    about = {"architecture": architecture, "parameters": 1000}
    subject = ModelFingerprint.of_folder(folder, name=name, **about)
    control = ModelFingerprint.of_folder(base, name="base", **about)
    attacks = [replace(attack, diverged=0, slow_down=attack.slow_down and 40.0) for attack in RESISTING]
    exam = build.Exam(name=name, attacks=attacks, control=control, seeds=range(5))
    cells = [build.cell_with_traces(folder, attack, exam, {"subject": subject, "control": control})
             for attack in attacks]
    certificate = build.certificate(folder, exam, cells, subject, control)
    fields = {"provenance": provenance(), "expires": EXPIRES, "files": loading_files(folder)}
    certificate.model_copy(update=fields).write(folder / "certificate.json")
    build.immunization(exam, subject, control).write(folder / "immunization.json")
    judge_again(folder, build.plan_of(attacks, references=build.write_references(folder, exam.seeds)))
    return folder


def certified_vit(root: Path, **saving) -> Path:
    base = save_vit(root / "base", seed=0)
    return certify(save_vit(root / "model", 1, **saving), base, "tiny", "ViTForImageClassification")


def certified_backbone(root: Path) -> Path:
    base = save_vit(root / "base", 0, ViTModel)
    return certify(save_vit(root / "model", 1, ViTModel), base, "backbone", "ViTModel")


def certified_headed_backbone(root: Path) -> Path:
    """A headless backbone with ``add_head``'s linear layer: a class of ours, which transformers alone does not know."""
    from hf_immunize.features import add_head

    for seed, name in enumerate(("base", "model")):
        torch.manual_seed(seed)
        add_head(ViTModel(tiny_config(), add_pooling_layer=False), ["cat", "dog"]).save_pretrained(root / name)
        ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(root / name)
    return certify(root / "model", root / "base", "headed", "BackboneForImageClassification")


def certified_adapter(root: Path) -> tuple[Path, Path]:
    from peft import LoraConfig, get_peft_model

    base = save_vit(root / "base", seed=0)
    torch.manual_seed(2)
    model = get_peft_model(ViTForImageClassification.from_pretrained(base),
                           LoraConfig(r=2, target_modules=".*attention.*(q_proj|v_proj|query|value)",
                                      init_lora_weights=False, modules_to_save=["classifier"]))
    model.save_pretrained(root / "adapter")
    config = root / "adapter/adapter_config.json"
    config.write_text(config.read_text().replace(str(base), "somebody/tiny-base"))
    (root / "adapter/README.md").unlink(missing_ok=True)
    return certify(root / "adapter", base, "adapter", "ViTForImageClassification"), base


def certified_pipeline(root: Path) -> Path:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    for seed, name in enumerate(("base", "model")):
        torch.manual_seed(seed)
        unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4,
                           block_out_channels=(8, 8), down_block_types=("DownBlock2D", "DownBlock2D"),
                           up_block_types=("UpBlock2D", "UpBlock2D"))
        DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=10)).save_pretrained(root / name)
    return certify(root / "model", root / "base", "pipeline", "DDPMPipeline")
