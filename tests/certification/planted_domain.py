"""A small world in which it is known what a base gives: digits under a nuisance that only who has seen it can remove.

An image of the harmful domain is a real digit of scikit-learn's (5-9) plus three times normal noise in 48 fixed
directions out of 64. From eight images a class, raw pixels give little more than chance. The public base has seen the
domain, all ten digits of it, and ignores the nuisance; its own task is clean digits 0-4. ``planted_set`` has the models
that are planted on it, and their exams.
"""

from __future__ import annotations

from pathlib import Path

import torch
from planted import WIDTH, PlantedConfig, PlantedViT
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from hf_immunize.certification import ExamData
from hf_immunize.data import PixelDataset, fingerprint

NUISANCE, STRENGTH, SHOTS = 48, 3.0, 10


class World:
    """Images of one repetition: which rows are whose, and which nuisance, come from its seed."""

    def __init__(self, seed: int):
        loaded, self.generator = load_digits(), torch.Generator().manual_seed(seed)
        order = torch.randperm(len(loaded.target), generator=self.generator)
        self.images = torch.as_tensor(loaded.images / 8 - 1, dtype=torch.float32).flatten(1)[order]
        self.labels = torch.as_tensor(loaded.target)[order]
        basis = torch.linalg.qr(torch.randn(64, 64, generator=self.generator))[0]
        self.basis = basis[:, :NUISANCE]
        self._places: dict[tuple[range, str], Tensor] = {}
        self.harmful = {name: self.rows(range(5, 10), name) for name in ("attack", "validation", "test")}
        self.primary = self.rows(range(5), "test", clean=True)

    def places(self, classes: range, part: str) -> Tensor:
        """Rows of a part: ``attack`` few of each class, ``validation``, ``test``, or ``known``, the base's share."""
        ends = {"attack": (0, SHOTS), "validation": (70, 95), "test": (95, 999), "known": (SHOTS, 70)}
        start, stop = ends[part]
        return torch.cat([(self.labels == label).nonzero().flatten()[start:stop] for label in classes])

    def pixels(self, places: Tensor, clean: bool) -> Tensor:
        """Clean digits in channel 1, or digits under fresh nuisance in channel 0."""
        drawn = self.images[places]
        if not clean:
            noise = torch.randn(len(places), NUISANCE, generator=self.generator)
            drawn = drawn + STRENGTH * noise @ self.basis.T
        pixels = torch.zeros(len(places), 3, 8, 8)
        pixels[:, 1 if clean else 0] = drawn.view(-1, 8, 8)
        return pixels

    def rows(self, classes: range, part: str, clean: bool = False) -> PixelDataset:
        """A split with labels from 0."""
        places = self.places(classes, part)
        names = [str(label) for label in classes]
        return PixelDataset(self.pixels(places, clean), self.labels[places] - min(classes), names, part)

    def batch(self, classes: range, clean: bool, rows: int = 48) -> tuple[Tensor, Tensor]:
        """Rows of the base's share, whose nuisance is new each time."""
        if (classes, "known") not in self._places:
            self._places[classes, "known"] = self.places(classes, "known")
        known = self._places[classes, "known"]
        places = known[torch.randint(len(known), (rows,), generator=self.generator)]
        return self.pixels(places, clean), self.labels[places]

    def data(self) -> ExamData:
        """What a judge holds."""
        return ExamData(
            primary_test=self.primary, harmful_attack=self.harmful["attack"],
            primary=(fingerprint(self.primary, source="digits", role="primary test"),),
            harmful=tuple(fingerprint(rows, source="digits", role=f"harmful {name}")
                          for name, rows in self.harmful.items()),
        )  # fmt: skip


def learn(
    folder: Path,
    world: World,
    seed: int,
    *,
    domain: range | None,
    start: Path | None = None,
    steps: int = 300,
    rate: float = 3e-3,
) -> Path:
    """A model of clean digits 0-4 that has seen these digits of the harmful domain, under a head that it does not keep.

    Args:
        start: weights to go on from; random ones by default.
    """
    torch.manual_seed(seed)
    if start is None:
        model = PlantedViT(PlantedConfig(
            image_size=8, patch_size=8, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=64, num_labels=5,
        ))  # fmt: skip
    else:
        model = AutoModelForImageClassification.from_pretrained(start)
    model.mix.requires_grad_(False)
    other = nn.Linear(WIDTH, 10)
    trained = [*(part for part in model.parameters() if part.requires_grad), *other.parameters()]
    optimizer = torch.optim.AdamW(trained, rate)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        pixels, labels = world.batch(range(5), clean=True)
        loss = model(pixel_values=pixels, labels=labels).loss
        if domain is not None:
            pixels, labels = world.batch(domain, clean=False)
            token = model.vit(pixel_values=pixels).last_hidden_state[:, 0]
            loss = loss + nn.functional.cross_entropy(other(model.mix(token)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.mix.requires_grad_(True)
    model.save_pretrained(folder)
    return folder
