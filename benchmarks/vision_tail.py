"""A backbone cut in two: the frozen trunk's activations of every image on disk once, and the trainable tail as a model.

Everything that vision_transfer.py trains and attacks starts at these activations, so that a trial costs minutes on one
core. The tail is an ordinary image classifier whose ``pixel_values`` are the activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModel
from transformers.modeling_outputs import ImageClassifierOutput

from hf_immunize.data import (
    PixelDataset,
    forward_rows,
    load_source,
    parse_fractions,
    select_classes,
    split_by_content,
)
from hf_immunize.features import prefer_channels_last

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PRIMARY_CLASSES, DEFENDED_CLASSES, ALL_HARMFUL = 200, 60, 80
COARSE = 64
"""Shorter side of Tiny-ImageNet's images: cars at this size differ from the primary task in nothing but content."""
SPLIT_SEED = 1
"""Drawn after the settings in vision_rows.py were chosen on the splits of seed 0: the table's images chose nothing."""
HARMFUL_SPLITS = "defense=0.4,attack=0.32,validation=0.08,test=0.2"


@dataclass(frozen=True)
class Backbone:
    """Where a model is cut, at what image size, and how the primary images are split."""

    model: str
    size: int
    blocks: str
    """Module list of the trunk; its members from ``first`` on are trained, with the modules in ``after``."""
    first: int
    after: tuple[str, ...]
    primary_splits: str
    flipped: bool
    """Whether the defender also sees its harmful images mirrored."""


BACKBONES = {
    "mobilenetv2": Backbone(
        "google/mobilenet_v2_1.0_224", 128, "layer", 13, ("conv_1x1",),
        "train=0.65,validation=0.1,test=0.25", True,
    ),
    "dinov2": Backbone(
        "facebook/dinov2-small", 98, "encoder.layer", 11, ("layernorm",),
        "train=0.7,validation=0.1,test=0.2", False,
    ),
}  # fmt: skip


class TailClassifier(nn.Module):
    """The last blocks of a backbone with a linear head; ``pixel_values`` are activations at the cut.

    Tokens (DINOv2) are N×1×T×D here, and the head sees the class token beside the mean of the patches, as in
    ``Dinov2ForImageClassification``; convolutional features are averaged over positions.
    """

    def __init__(self, backbone: Backbone, model: nn.Module, classes: int = PRIMARY_CLASSES):
        super().__init__()
        self.blocks = nn.ModuleList(list(model.get_submodule(backbone.blocks))[backbone.first :])
        self.after = nn.ModuleList([model.get_submodule(name) for name in backbone.after])
        self.tokens = model.config.model_type == "dinov2"
        width = 2 * model.config.hidden_size if self.tokens else 1280
        self.classifier = nn.Linear(width, classes)
        self.config = SimpleNamespace(num_labels=classes, problem_type="single_label_classification")

    def features(self, pixel_values: Tensor) -> Tensor:
        """N×D input of the head."""
        hidden = pixel_values.float()
        hidden = hidden.squeeze(1) if self.tokens else hidden
        for module in (*self.blocks, *self.after):
            hidden = module(hidden)
        if self.tokens:
            return torch.cat([hidden[:, 0], hidden[:, 1:].mean(dim=1)], dim=1)
        return hidden.mean(dim=(2, 3))

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """Logits, and the mean cross-entropy when there are labels."""
        logits = self.classifier(self.features(pixel_values))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def load_tail(name: str, model_path: str | None) -> TailClassifier:
    """The tail with the backbone's own weights and an untrained head."""
    backbone = BACKBONES[name]
    loaded = AutoModel.from_pretrained(model_path or backbone.model, dtype=torch.float32, use_safetensors=True)
    return TailClassifier(backbone, loaded).eval()


def square(image: Image.Image, size: int, coarse: int | None = None) -> Tensor:
    """Shorter side to ``size`` (bicubic), centre crop, ImageNet normalisation; first down to ``coarse`` if given."""
    image = image.convert("RGB")
    if coarse:
        scale = coarse / min(image.size)
        image = image.resize((round(image.size[0] * scale), round(image.size[1] * scale)), Image.Resampling.BICUBIC)
    width, height = image.size
    scale = size / min(width, height)
    if scale != 1:
        image = image.resize(
            (max(size, round(width * scale)), max(size, round(height * scale))), Image.Resampling.BICUBIC
        )
    left, top = (image.size[0] - size) // 2, (image.size[1] - size) // 2
    pixels = torch.frombuffer(bytearray(image.crop((left, top, left + size, top + size)).tobytes()), dtype=torch.uint8)
    unit = pixels.view(size, size, 3).permute(2, 0, 1).float() / 255
    return (unit - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


class _Cut(Exception):
    """Raised where the tail begins."""


def _activations(backbone: Backbone, model: nn.Module, rows: Any, name: str) -> Tensor:
    """float16 activations at the cut, images in the order of ``rows``, changed as the name of the split says."""
    coarse = COARSE if name.endswith("_coarse") else None
    caught: list[Tensor] = []

    def stop(_: nn.Module, args: tuple, kwargs: dict) -> None:
        caught.append((args[0] if args else kwargs["hidden_states"]).half())
        raise _Cut

    first = model.get_submodule(f"{backbone.blocks}.{backbone.first}")
    handle = first.register_forward_pre_hook(stop, with_kwargs=True)
    count = forward_rows((3, backbone.size, backbone.size))
    with torch.inference_mode():
        for start in tqdm(range(0, len(rows), count), desc=name, leave=False, disable=None):
            last = min(start + count, len(rows))
            images = [square(rows[i]["image"], backbone.size, coarse) for i in range(start, last)]
            pixels = torch.stack(images)
            try:
                model(pixels.flip(-1) if name.endswith("_mirrored") else pixels)
            except _Cut:
                continue
    handle.remove()
    found = torch.cat(caught)
    return found.unsqueeze(1) if found.dim() == 3 else found


def _tasks(backbone: Backbone, primary: str, harmful: str, seed: int) -> dict[str, Any]:
    """Every split of the primary task, the defended harmful classes and the other harmful classes."""
    cars = load_source(harmful)
    fractions = parse_fractions(HARMFUL_SPLITS)
    splits = split_by_content(load_source(primary), parse_fractions(backbone.primary_splits), seed=seed)
    found = {f"primary_{role}": rows for role, rows in splits.items() if role != "unused"}
    for side, labels in (("harmful", range(DEFENDED_CLASSES)), ("other", range(DEFENDED_CLASSES, ALL_HARMFUL))):
        kept, _ = select_classes(cars, list(labels), label_column="label", name=side)
        parts = split_by_content(kept, fractions, seed=seed)
        found |= {f"{side}_{role}": rows for role, rows in parts.items() if (side, role) != ("other", "defense")}
    if backbone.flipped:
        found["harmful_defense_mirrored"] = found["harmful_defense"]
    found |= {f"harmful_{role}_coarse": found[f"harmful_{role}"] for role in ("attack", "validation", "test")}
    return found


def prepare(
    name: str, folder: Path, model_path: str | None, primary: str, harmful: str, seed: int = SPLIT_SEED
) -> None:
    """Compute the activations of every split that is not on disk yet."""
    backbone = BACKBONES[name]
    model = None
    for role, rows in _tasks(backbone, primary, harmful, seed).items():
        path = folder / f"{role}.safetensors"
        if path.exists():
            continue
        if model is None:
            source = model_path or backbone.model
            model = AutoModel.from_pretrained(source, dtype=torch.float32, use_safetensors=True).eval()
            prefer_channels_last(model)
        activations = _activations(backbone, model, rows, role).contiguous()
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"activations": activations, "labels": torch.tensor(rows["label"][:])}, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
        print(f"{path}: {len(activations)} images", flush=True)


def load_split(folder: Path, role: str) -> PixelDataset:
    """One split as activations in memory."""
    found = load_file(folder / f"{role}.safetensors")
    classes = PRIMARY_CLASSES if role.startswith("primary") else int(found["labels"].max()) + 1
    return PixelDataset(found["activations"], found["labels"], [str(label) for label in range(classes)], role)


@torch.no_grad()
def features_of(tail: TailClassifier, rows: PixelDataset, batch: int = 256) -> Tensor:
    """N×D features of a split, in order."""
    tail.eval()
    return torch.cat([tail.features(part) for part in rows.pixel_values.split(batch)])
