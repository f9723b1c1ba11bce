"""Light random changes to images that are already tensors; no torchvision, no global random state.

Our own, since an image's change has to follow its own seed alone, on any number of ranks and after a resume: kornia
draws a batch's changes from torch's global generator and takes no other, albumentations is for numpy arrays that nobody
has normalised yet.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from hf_immunize.errors import ConfigError


def _flip(image: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror left and right, half of the time."""
    return image.flip(-1) if torch.rand((), generator=generator) < 0.5 else image


def _crop(image: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to an eighth of each side, borders reflected."""
    pad = [max(1, size // 8) for size in image.shape[-2:]]
    padded = functional.pad(image[None], (pad[1], pad[1], pad[0], pad[0]), mode="reflect")[0]
    top, left = (int(torch.randint(2 * size + 1, (), generator=generator)) for size in pad)
    return padded[..., top : top + image.shape[-2], left : left + image.shape[-1]]


def _color(image: Tensor, generator: torch.Generator) -> Tensor:
    """Scale contrast by up to a fifth either way, and shift brightness by up to a fifth of the standard deviation."""
    contrast, shift = (0.4 * torch.rand(2, generator=generator) - 0.2).tolist()
    mean = image.mean()
    return (image - mean) * (1 + contrast) + mean + shift * image.std()


def _erase(image: Tensor, generator: torch.Generator) -> Tensor:
    """Replace a square of a quarter of each side by the image's mean, half of the time (DeVries & Taylor 2017)."""
    if torch.rand((), generator=generator) < 0.5:
        return image
    sides = [max(1, size // 4) for size in image.shape[-2:]]
    ranges = zip(image.shape[-2:], sides, strict=True)
    top, left = (int(torch.randint(size - side + 1, (), generator=generator)) for size, side in ranges)
    erased = image.clone()
    erased[..., top : top + sides[0], left : left + sides[1]] = image.mean()
    return erased


AUGMENTATIONS = {"flip": _flip, "crop": _crop, "color": _color, "erase": _erase}


def parse_augmentation(text: str) -> tuple[str, ...]:
    """Names of the changes in ``"flip,crop"``, in order. Raises ConfigError for one that is not known."""
    names = tuple(part.strip() for part in text.split(","))
    unknown = sorted(set(names) - set(AUGMENTATIONS))
    if unknown:
        raise ConfigError(f"expected augmentation of {sorted(AUGMENTATIONS)} joined with commas, got {unknown}.")
    return names


def augment(pixels: Tensor, names: tuple[str, ...], seeds: list[int]) -> Tensor:
    """Each image changed by its own draws: image i depends on ``seeds[i]`` alone, not on the batch it is in."""
    changed = []
    for image, seed in zip(pixels, seeds, strict=True):
        generator = torch.Generator().manual_seed(seed % 2**63)
        for name in names:
            image = AUGMENTATIONS[name](image, generator)
        changed.append(image)
    return torch.stack(changed)
