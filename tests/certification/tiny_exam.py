"""A tiny exam of three attacks on blobs, seconds long: real runs, on models too small to mean much."""

from __future__ import annotations

from pathlib import Path

import torch

from hf_immunize.attacks import ATTACKS, AttackContext, run_suite
from hf_immunize.certification import ExamData, Protocol
from hf_immunize.data import PixelDataset, fingerprint

SETTINGS = {
    "linear_probe_gd": {"steps": (300,), "learning_rate": (4.0, 64.0)},
    "ridge_probe": {"penalty": (1e-3, 1e-6), "features": ("centered",)},
    "full_finetune": {"steps": (12,), "learning_rate": (1e-2,)},
}
PROTOCOL = Protocol(attacks=(*SETTINGS, "lora"), seeds=(0, 1, 2))


def blobs(rows: int, seed: int, classes: int, spread: float = 0.4) -> PixelDataset:
    """Classes that differ by one smooth pattern each: easy for any probe. The same values on every processor."""
    patterns = torch.randn(classes, 3, 8, 8, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % classes
    pixels = patterns[labels] + spread * torch.randn(rows, 3, 8, 8, generator=generator)
    pixels = (256 * pixels).round() / 256  # draws of the normal distribution differ in their last digit
    return PixelDataset(pixels, labels, [f"class {index}" for index in range(classes)])


def sit_exam(
    folder: Path, role: str, exam, seeds=(0, 1, 2), names=tuple(SETTINGS), settings=SETTINGS, base: Path | None = None
) -> None:
    """Attack ``folder`` in one role with the tiny exam."""
    data, splits = exam
    context = AttackContext(folder=folder, role=role, data=data.harmful, base=base, **splits)
    run_suite(context, ATTACKS, list(names), seeds, folder, settings)


def make_exam_data():
    """What is judged, and the attacker's three splits of three classes."""
    sizes = {"attack": 60, "validation": 30, "test": 60}
    harmful = {name: blobs(rows, seed, 3) for seed, (name, rows) in enumerate(sizes.items(), start=1)}
    primary = blobs(80, 4, 2)
    data = ExamData(
        primary_test=primary,
        harmful_attack=harmful["attack"],
        primary=(fingerprint(primary, source="blobs", role="primary test"),),
        harmful=tuple(fingerprint(split, source="blobs", role=f"harmful {name}") for name, split in harmful.items()),
    )
    return data, harmful


def train_base(folder: Path) -> Path:
    """A tiny ViT that knows the two-class primary task."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        num_labels=2,
    )
    model = ViTForImageClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    train = blobs(128, 5, 2)
    for _ in range(40):
        model(pixel_values=train.pixel_values, labels=train.labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder
