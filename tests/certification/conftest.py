"""Makes ``tests/trace_builders.py`` importable here, and builds tiny attacked model folders."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_exam import blobs, sit_exam

from hf_immunize.certification import ExamData
from hf_immunize.data import fingerprint


@pytest.fixture(scope="session")
def exam_data():
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


@pytest.fixture(scope="session")
def trained_base(tmp_path_factory, exam_data):
    """A tiny ViT that knows the two-class primary task, attacked in both roles. Copy it; do not change it."""
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
    folder = tmp_path_factory.mktemp("models") / "base"
    model.save_pretrained(folder)
    sit_exam(folder, "control", exam_data)
    sit_exam(folder, "subject", exam_data)
    return folder


@pytest.fixture
def exam_folders(tmp_path, trained_base):
    """Fresh copies: (base with control traces, the base itself attacked as the subject)."""
    base, subject = tmp_path / "base", tmp_path / "subject"
    shutil.copytree(trained_base, base, ignore=shutil.ignore_patterns("subject"))
    shutil.copytree(trained_base, subject, ignore=shutil.ignore_patterns("control"))
    return base, subject
