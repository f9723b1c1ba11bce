"""Tiny models and data that every test may use. Random weights exercise code; they support no claim."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import settings
from transformers import ViTConfig, ViTForImageClassification

from hf_immunize.data import PixelDataset

torch.set_num_threads(1)
settings.register_profile("busy", deadline=None)  # a machine that is busy is no failure
settings.load_profile("busy")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The built wheel, outside the clone."""
    from installed import build_wheel

    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    """An environment of its own with the wheel, where the clone cannot be imported."""
    from installed import install

    return install(wheel, tmp_path_factory.mktemp("installed"))


@pytest.fixture
def make_vit():
    def build(labels: int = 3, dtype=torch.float32, seed: int = 0, dropout: float = 0.0, layers: int = 2):
        torch.manual_seed(seed)
        config = ViTConfig(
            image_size=8,
            patch_size=4,
            hidden_size=16,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=32,
            num_labels=labels,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
        return ViTForImageClassification(config).to(dtype)

    return build


@pytest.fixture
def make_pixels():
    def build(rows: int = 24, classes: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32, size: int = 8):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(rows) % classes
        pixels = torch.randn(rows, 3, size, size, generator=generator, dtype=dtype)
        pixels = pixels + labels.to(dtype)[:, None, None, None]
        return PixelDataset(pixels, labels, [f"class {index}" for index in range(classes)])

    return build


@pytest.fixture(scope="session")
def digits_base(tmp_path_factory):
    """Folder of a small ViT that was trained on the real digits 0-4, with its processor: 98 % on held-out rows."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

    from hf_immunize.data import Task, TaskArguments

    recipe, folder = Path(__file__).parent.parent / "recipes" / "digits-vit" / "vit", tmp_path_factory.mktemp("base")
    processor = AutoImageProcessor.from_pretrained(recipe, backend="pil", size={"height": 8, "width": 8})
    arguments = TaskArguments("builder:digits", "builder:digits", primary_labels="0,1,2,3,4")
    rows = Task(arguments, "primary").pixels("train", processor)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        names = dict(enumerate("01234"))
        config = AutoConfig.from_pretrained(
            recipe, image_size=8, patch_size=2, id2label=names, label2id={n: i for i, n in names.items()}
        )
        model = AutoModelForImageClassification.from_config(config).train()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        for step in range(200):
            chosen = torch.randperm(len(rows))[:64]
            optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / 200)
            optimizer.zero_grad()
            model(pixel_values=rows.pixel_values[chosen], labels=rows.labels[chosen]).loss.backward()
            optimizer.step()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def digits_primary():
    """The real digits 0-4 and 5-9 as (primary, harmful) tasks with the demo's processor settings."""
    from transformers import ViTImageProcessorPil

    from hf_immunize.data import Task, TaskArguments

    processor = ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    arguments = TaskArguments(
        "builder:digits", "builder:digits", primary_labels="0,1,2,3,4", harmful_labels="5,6,7,8,9"
    )
    return Task(arguments, "primary"), Task(arguments, "harmful"), processor
