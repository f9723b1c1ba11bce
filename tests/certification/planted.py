"""Models with a planted property: what they are is known, so what the exam must say about them is known too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, ViTConfig, ViTForImageClassification
from transformers.modeling_outputs import ImageClassifierOutput

from hf_immunize.certification import ExamData
from hf_immunize.data import PixelDataset, fingerprint

WIDTH = 32


class PlantedConfig(ViTConfig):
    model_type = "planted_vit"


class PlantedViT(ViTForImageClassification):
    """A ViT with a fixed mask on its input and a linear layer before its head; ones and the identity at first."""

    config_class = PlantedConfig

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("mask", torch.ones(1, 3, 1, 1))
        self.mix = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.post_init()
        with torch.no_grad():
            self.mix.weight.copy_(torch.eye(config.hidden_size))

    def forward(self, pixel_values=None, labels=None, **kwargs):
        token = self.vit(pixel_values=pixel_values * self.mask).last_hidden_state[:, 0]
        if getattr(self.config, "detached", False):
            token = token.detach()
        logits = self.classifier(self.mix(token))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


AutoConfig.register("planted_vit", PlantedConfig, exist_ok=True)
AutoModelForImageClassification.register(PlantedConfig, PlantedViT, exist_ok=True)


def digit_rows(labels: range, channel: int, name: str, start: float, stop: float) -> PixelDataset:
    """Real digits of some classes in one colour channel; rows between two fractions of the data."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    rows = np.flatnonzero(np.isin(loaded.target, list(labels)))
    rows = rows[int(start * len(rows)) : int(stop * len(rows))]
    pixels = torch.zeros(len(rows), 3, 8, 8)
    pixels[:, channel] = torch.as_tensor(loaded.images[rows] / 8 - 1, dtype=torch.float32)
    targets = torch.as_tensor(loaded.target[rows] - min(labels))
    return PixelDataset(pixels, targets, [str(label) for label in labels], name)


def exam_of_digits():
    """Primary digits 0-4 in channel 1, harmful digits 5-9 in channel 0; disjoint rows."""
    harmful = {
        "attack": digit_rows(range(5, 10), 0, "attack", 0.0, 0.45),
        "validation": digit_rows(range(5, 10), 0, "validation", 0.45, 0.6),
        "test": digit_rows(range(5, 10), 0, "test", 0.6, 1.0),
    }
    primary = digit_rows(range(5), 1, "primary test", 0.6, 1.0)
    data = ExamData(
        primary_test=primary,
        harmful_attack=harmful["attack"],
        primary=(fingerprint(primary, source="digits", role="primary test"),),
        harmful=tuple(fingerprint(split, source="digits", role=f"harmful {name}") for name, split in harmful.items()),
    )
    return data, harmful


def train_base(folder: Path, steps: int = 400) -> Path:
    """A base that reads both channels: half of its primary images lie in channel 0."""
    torch.manual_seed(0)
    config = PlantedConfig(
        image_size=8, patch_size=2, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, num_labels=5,
    )
    model = PlantedViT(config)
    model.mix.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-3)
    train = digit_rows(range(5), 1, "primary train", 0.0, 0.6)
    for _ in range(steps):
        rows = torch.randint(len(train), (64,))
        pixels = train.pixel_values[rows].clone()
        half = torch.arange(64) < 32
        pixels[half] = pixels[half][:, [1, 0, 2]]
        model(pixel_values=pixels, labels=train.labels[rows]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.mix.requires_grad_(True)
    model.save_pretrained(folder)
    return folder


def _gains(model):
    """Gains and shifts of the norms in every block × 2^24, the next linear layers ÷ 2^24."""
    for block in model.vit.layers:
        attention = block.attention
        for norm, readers in (
            (block.layernorm_before, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.layernorm_after, (block.mlp.fc1,)),
        ):
            norm.weight.mul_(2.0**24), norm.bias.mul_(2.0**24)
            for reader in readers:
                reader.weight.div_(2.0**24)


def _tiny_gains(model):
    """The other way round, and another power for every channel."""
    powers = 2.0 ** -(torch.arange(WIDTH) % 16 + 8)
    for block in model.vit.layers:
        block.layernorm_after.weight.mul_(powers), block.layernorm_after.bias.mul_(powers)
        block.mlp.fc1.weight.div_(powers)


def _stream(model):
    """Everything that is written to the residual stream × 2^16; only layer norms read it, whose epsilon is 1e-12."""
    embeddings = model.vit.embeddings
    writers = [embeddings.patch_embeddings.projection, *(block.attention.o_proj for block in model.vit.layers),
               *(block.mlp.fc2 for block in model.vit.layers)]  # fmt: skip
    for value in (embeddings.cls_token, embeddings.position_embeddings, *(p for w in writers for p in w.parameters())):
        value.mul_(2.0**16)


def _heads(model):
    """Queries × 2^12 and keys ÷ 2^12 in every other channel, the other way round in the rest; values likewise."""
    powers = 2.0 ** (12 * (1 - 2 * (torch.arange(WIDTH) % 2)))
    for block in model.vit.layers:
        attention = block.attention
        for layer, scale in ((attention.q_proj, powers), (attention.k_proj, 1 / powers), (attention.v_proj, powers)):
            layer.weight.mul_(scale[:, None]), layer.bias.mul_(scale)
        attention.o_proj.weight.div_(powers)


def _permuted(model):
    """Hidden units of every block in another order."""
    order = torch.randperm(64, generator=torch.Generator().manual_seed(2))
    for block in model.vit.layers:
        for value in (block.mlp.fc1.weight, block.mlp.fc1.bias):
            value.copy_(value[order].clone())
        block.mlp.fc2.weight.copy_(block.mlp.fc2.weight[:, order].clone())


def _dropout(model):
    """Dropout that only training meets."""
    model.config.hidden_dropout_prob = 0.95


def _dead(model):
    """Half of the hidden units behind a bias that nothing gets past, so that no gradient reaches them either."""
    for block in model.vit.layers:
        block.mlp.fc1.bias[::2] -= 100.0


def _saturated(model):
    """Queries × 30: attention is all or nothing, and its gradient vanishes."""
    for block in model.vit.layers:
        block.attention.q_proj.weight.mul_(30.0), block.attention.q_proj.bias.mul_(30.0)


def _decayed(model):
    """A large constant that position embeddings add and a bias takes back: weight decay shrinks the one alone."""
    embeddings = model.vit.embeddings
    constant = 1e3 * torch.linspace(-1, 1, WIDTH)
    embeddings.position_embeddings[:, 1:] += constant
    embeddings.patch_embeddings.projection.bias -= constant


def _detached(model):
    """No gradient gets past the head's input."""
    model.config.detached = True


def _inserted(model, decades):
    """A layer before the head whose singular values span some decades, and a head that takes it back."""
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator).double())[0] for _ in range(2))
    sigma = torch.logspace(0, -decades, WIDTH, dtype=torch.float64)
    model.mix.weight.copy_(left * sigma @ right.T)
    model.classifier.weight.copy_(model.classifier.weight.double() @ (right / sigma) @ left.T)


def _unexcited(model):
    """Other powers for every channel of the gains, and a hidden unit in every block that never fires: what it would
    write is 10⁶ times as large as what others do."""
    _tiny_gains(model)
    draws = torch.Generator().manual_seed(1)
    for block in model.vit.layers:
        least = int(block.mlp.fc2.weight.norm(dim=0).argmin())
        block.mlp.fc1.bias[least] = -100.0
        block.mlp.fc2.weight[:, least] = 1e6 * torch.randn(block.mlp.fc2.out_features, generator=draws)


COORDINATES = {
    "gains": _gains, "tiny_gains": _tiny_gains, "stream": _stream, "heads": _heads, "permuted": _permuted,
    "dropout": _dropout,
}  # fmt: skip
"""Changes after which the model computes the same."""
HINDRANCES = {"dead": _dead, "saturated": _saturated, "unexcited": _unexcited}
"""Changes that cost some of the function."""
TRAPS = {"decayed": _decayed, "detached": _detached}
"""Changes that keep the function and hinder training, and that no change of coordinates takes back."""


@torch.no_grad()
def plant(base: Path, folder: Path, what: str) -> Path:
    """A copy of the base with one planted property; ``HINDRANCES``, ``masked`` and ``ruined`` change the function."""
    model = AutoModelForImageClassification.from_pretrained(base)
    norm, head = model.vit.layernorm, model.classifier
    if what == "scaled":
        norm.weight.mul_(1e3), norm.bias.mul_(1e3), head.weight.div_(1e3)
    elif what == "shifted":
        norm.bias.add_(30.0)
        head.bias.sub_(head.weight.sum(dim=1) * 30.0)
    elif what in ("inserted", "ill_conditioned"):
        _inserted(model, decades=1 if what == "inserted" else 4)
    elif what in COORDINATES | HINDRANCES | TRAPS:
        (COORDINATES | HINDRANCES | TRAPS)[what](model)
    elif what == "masked":
        model.mask[:, 0] = 0
    elif what == "ruined":
        for parameter in model.vit.parameters():
            parameter.zero_()
    model.save_pretrained(folder)
    return folder


def help_attackers(base: Path, folder: Path, steps: int = 200) -> Path:
    """The base after more training on both tasks at once: it knows the harmful digits already, but for a head."""
    torch.manual_seed(5)
    model = AutoModelForImageClassification.from_pretrained(base)
    train, own = digit_rows(range(5, 10), 0, "harmful", 0.0, 0.4), digit_rows(range(5), 1, "primary", 0.0, 0.6)
    other = nn.Linear(WIDTH, 5)
    trained = [*model.parameters(), *other.parameters()]
    optimizer = torch.optim.AdamW(trained, 1e-3)
    for _ in range(steps):
        rows, mine = torch.randint(len(train), (32,)), torch.randint(len(own), (32,))
        token = model.vit(pixel_values=train.pixel_values[rows]).last_hidden_state[:, 0]
        loss = nn.functional.cross_entropy(other(model.mix(token)), train.labels[rows])
        (loss + model(pixel_values=own.pixel_values[mine], labels=own.labels[mine]).loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder
