"""A tiny exam of three attacks on blobs, seconds long: real runs, on models too small to mean much."""

from __future__ import annotations

from pathlib import Path

import torch

from hf_immunize.attacks import ATTACKS, AttackContext, run_suite
from hf_immunize.certification import Protocol
from hf_immunize.data import PixelDataset

SETTINGS = {
    "linear_probe_gd": {"steps": (300,), "learning_rate": (4.0, 64.0)},
    "ridge_probe": {"penalty": (1e-3, 1e-6), "features": ("centered",)},
    "full_finetune": {"steps": (12,), "learning_rate": (1e-2,)},
}
PROTOCOL = Protocol(attacks=(*SETTINGS, "lora"), seeds=(0, 1, 2))


def blobs(rows: int, seed: int, classes: int, spread: float = 0.4) -> PixelDataset:
    """Classes that differ by one smooth pattern each: easy for any probe."""
    patterns = torch.randn(classes, 3, 8, 8, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % classes
    pixels = patterns[labels] + spread * torch.randn(rows, 3, 8, 8, generator=generator)
    return PixelDataset(pixels, labels, [f"class {index}" for index in range(classes)])


def sit_exam(
    folder: Path, role: str, exam, seeds=(0, 1, 2), names=tuple(SETTINGS), settings=SETTINGS, base: Path | None = None
) -> None:
    """Attack ``folder`` in one role with the tiny exam."""
    data, splits = exam
    context = AttackContext(folder=folder, role=role, data=data.harmful, base=base, **splits)
    run_suite(context, ATTACKS, list(names), seeds, folder, settings)
