"""The rows an attack trains on: few, mislabelled, noisy, mixed with benign ones or augmented, as its config says."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hf_immunize.attacks.vision.context import AttackContext
from hf_immunize.data import ImagePixels, PixelDataset, collate_pixels


def training_rows(context: AttackContext, config: Any, seed: int) -> PixelDataset:
    """This seed's rows, changed as the attack's config says."""
    rows = context.draw_rows(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    shots, label_noise, pixel_noise, benign_share = (
        getattr(config, name, None) for name in ("shots", "label_noise", "pixel_noise", "benign_share")
    )
    if shots is not None:
        rows = rows[torch.randperm(len(rows), generator=generator)]
        labels = context.attack.labels[rows]
        rows = torch.cat([rows[labels == label][:shots] for label in range(context.classes)])
    data = context.attack.subset(rows)
    if label_noise:
        drawn = torch.randint(context.classes, (len(data),), generator=generator)
        noisy = torch.rand(len(data), generator=generator) < label_noise
        data.labels = torch.where(noisy, drawn, data.labels)
    if pixel_noise:
        data = _noisy(data, pixel_noise, generator)
    return _with_benign(data, context.benign, benign_share, generator) if benign_share else data


def _noisy(data: PixelDataset, noise: float, generator: torch.Generator) -> PixelDataset:
    """The same rows, each with its own noise, whenever it is read; in units of the pixels' deviation."""
    size = noise * pixel_deviation(data)
    seeds = torch.randint(2**62, (len(data),), generator=generator).tolist()

    def read(rows: Sequence[int]) -> Tensor:
        clean = data.stacked(torch.as_tensor(rows))
        drawn = [torch.randn(data.image_shape, generator=torch.Generator().manual_seed(seeds[row])) for row in rows]
        return clean + size * torch.stack(drawn).to(clean)

    return ImagePixels(read, torch.arange(len(data)), data.labels, data.label_names, data.name)


def pixel_deviation(data: PixelDataset) -> float:
    """Standard deviation of all pixels of all rows, some rows in memory at a time."""
    count, total, squares = 0, 0.0, 0.0
    for block in data.blocks():
        count += block.numel()
        total += float(block.double().sum())
        squares += float(block.double().square().sum())
    return math.sqrt(max(0.0, squares - total**2 / count) / max(1, count - 1))


def _with_benign(
    data: PixelDataset, benign: PixelDataset | None, share: float, generator: torch.Generator
) -> PixelDataset:
    """Harmful rows, and as many benign ones (labels after the harmful ones) that they are ``share`` of all."""
    assert benign is not None  # the attack needs benign data and was found to have some
    count = min(len(benign), max(1, round(len(data) * share / (1 - share))))
    added = benign.subset(torch.randperm(len(benign), generator=generator)[:count])

    def read(rows: Sequence[int]) -> Tensor:
        return torch.stack([
            data[row]["pixel_values"] if row < len(data) else added[row - len(data)]["pixel_values"] for row in rows
        ])

    return ImagePixels(
        read,
        torch.arange(len(data) + len(added)),
        torch.cat([data.labels, added.labels + len(data.label_names)]),
        [*data.label_names, *(f"benign {name}" for name in added.label_names)],
        data.name,
    )


class Answered(Dataset[tuple[Tensor, Tensor]]):
    """Images with something else than a label each, such as another network's answers; read when asked for."""

    def __init__(self, rows: PixelDataset, answers: Tensor):
        self._rows, self._answers = rows, answers

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self._rows[row]["pixel_values"], self._answers[row]


def augment(
    pixels: Tensor, generator: torch.Generator, *, flip: bool, crop: float, jitter: float, erase: float
) -> Tensor:
    """A batch of N×C×H×W images, each flipped, shifted, changed in contrast and brightness, and partly blanked.

    Args:
        flip: mirror half of the images.
        crop: shift by up to this share of the side, edges repeated.
        jitter: contrast factor in 1 ± jitter, brightness offset in ± jitter standard deviations.
        erase: side of a square of the image's mean, as a share of the side; 0 blanks nothing.
    """
    count, _, height, width = pixels.shape

    def uniform() -> Tensor:
        return torch.rand(count, generator=generator)

    reach = max(round(crop * height), round(crop * width))
    padded = torch.nn.functional.pad(pixels, (reach,) * 4, mode="replicate") if reach else pixels
    tops, lefts = ((uniform() * (2 * reach + 1)).long() for _ in range(2))
    rows = tops[:, None] + torch.arange(height)
    columns = lefts[:, None] + torch.arange(width)
    mirrored = (uniform() < 0.5) & flip
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    drawn = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    contrast, offset = (1 + jitter * (2 * uniform() - 1), jitter * (2 * uniform() - 1) * float(pixels.std()))
    mean = drawn.mean(dim=(1, 2, 3), keepdim=True)
    drawn = (drawn - mean) * contrast.to(drawn)[:, None, None, None] + mean + offset.to(drawn)[:, None, None, None]
    inside = _blanked(uniform(), height, erase)[:, :, None] & _blanked(uniform(), width, erase)[:, None, :]
    return torch.where(inside[:, None], mean, drawn).contiguous()


def _blanked(place: Tensor, side: int, erase: float) -> Tensor:
    """Which positions of one axis a square of ``erase`` of the side covers, per image."""
    length = round(erase * side)
    start = (place * (side - length + 1)).long()[:, None]
    positions = torch.arange(side)
    return (positions >= start) & (positions < start + length)


def collator(config: Any, seed: int) -> Callable[[Sequence[dict[str, Any]]], dict[str, Tensor]]:
    """Stacks rows; augments them from the run's own seed where the config has the four options of ``augment``."""
    if not hasattr(config, "erase"):
        return collate_pixels
    generator = torch.Generator().manual_seed(seed + 2)
    options = {name: getattr(config, name) for name in ("flip", "crop", "jitter", "erase")}

    def augmented(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        batch = collate_pixels(rows)
        return batch | {"pixel_values": augment(batch["pixel_values"], generator, **options)}

    return augmented
