"""Copies that hashes of pixels miss: resized, encoded again or mirrored images, found by small grey thumbnails.

Two images look alike when their 16×16 grey thumbnails, or one and the mirror image of the other, correlate by at least
0.995 (0.9 for two that are as rough as noise) and their mean colours differ by at most 32 of 256 levels. An image with
a side below 32 pixels, or whose thumbnail has a standard deviation below 2 levels, is not compared: there, different
images look alike. docs/data.md has what this was chosen by.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from hf_immunize.data.caching import cache_folder, identity_of, is_shared
from hf_immunize.data.fingerprint import as_digests, as_rows, digest_pixels
from hf_immunize.data.row_store import RowStore
from hf_immunize.data.rows import read_image

SIDE = 16
SMALLEST_SIDE = 32
LEAST_CONTRAST = 2.0
CORRELATION = 0.995
ROUGH = 2.5
"""Squared differences of neighbours over squared levels: about 3.8 for noise, 0.2 to 2 for photos of things."""
ROUGH_CORRELATION = 0.9
COLOUR = 32.0
_BLOCK = 1024
_READ = 256


@dataclass(frozen=True)
class Looks:
    """What is kept of N images to tell copies.

    Args:
        contents: SHA-256 of each one's decoded pixels.
        thumbnails: N×16×16×3 uint8.
        compared: N truth values, whether an image is large enough to be compared by its thumbnail.
    """

    contents: list[bytes]
    thumbnails: np.ndarray
    compared: np.ndarray

    @staticmethod
    def joined(parts: Sequence[Looks]) -> Looks:
        """The images of several parts, one after the other."""
        return Looks(
            [content for part in parts for content in part.contents],
            np.concatenate([part.thumbnails for part in parts]),
            np.concatenate([part.compared for part in parts]),
        )

    def select(self, places: Sequence[int]) -> Looks:
        """Some of the images."""
        chosen = np.asarray(places, dtype=np.int64)
        return Looks([self.contents[place] for place in places], self.thumbnails[chosen], self.compared[chosen])


def read_looks(dataset: Any, rows: Sequence[int], column: str, name: str, *, workers: int = 0) -> Looks:
    """Read the image of each row once, in ``workers`` processes besides this one.

    Of many rows, and where several processes ask, one process reads and the others find on disk what it found.

    Raises:
        DataError: an image that cannot be decoded; its row is named.
    """
    identity = identity_of(dataset, column, "looks", _digest_of(rows)) if is_shared(len(rows)) else None
    if identity is None or not len(rows):
        parts = list(_read_looks(dataset, rows, column, name, workers))
        digests, thumbnails, compared = (torch.cat(part) for part in zip(*parts, strict=True)) if parts else _nothing()
    else:
        batches = _read_looks(dataset, rows, column, name, workers)
        store = RowStore.open_or_write(cache_folder("looks") / identity, batches, len(rows))
        digests, thumbnails, compared = (store.column(place) for place in range(3))
    return Looks(as_digests(digests), thumbnails.numpy(), compared.numpy())


def _digest_of(rows: Sequence[int]) -> str:
    return hashlib.sha256(np.asarray(rows, dtype=np.int64).tobytes()).hexdigest()


def _nothing() -> tuple[torch.Tensor, ...]:
    empty = torch.zeros(0, SIDE, SIDE, 3, dtype=torch.uint8)
    return empty[:, 0, :, 0], empty, torch.zeros(0, dtype=torch.bool)


def _read_looks(
    dataset: Any, rows: Sequence[int], column: str, name: str, workers: int
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Digests, thumbnails and whether to compare, some rows at a time."""
    looks = DataLoader(_LookedAt(dataset, rows, column, name), batch_size=_READ, num_workers=workers)
    with tqdm(total=len(rows), desc=f"images of {name}", unit="row", leave=False, disable=None) as bar:
        for part in looks:
            yield tuple(part)
            bar.update(len(part[0]))


class _LookedAt(Dataset[tuple[torch.Tensor, torch.Tensor, bool]]):
    """Digest, thumbnail and size of the image in each of some rows."""

    def __init__(self, dataset: Any, rows: Sequence[int], column: str, name: str):
        self._dataset, self._rows, self._column, self._name = dataset, rows, column, name

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> tuple[torch.Tensor, torch.Tensor, bool]:
        from PIL import Image

        image = read_image(self._dataset, self._rows[place], self._column, self._name)
        large, thumbnail = min(image.size) >= SMALLEST_SIDE, np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
        if large:
            small = image.resize((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=2.0)
            thumbnail = np.array(small)
        return as_rows([digest_pixels(np.asarray(image))])[0], torch.from_numpy(thumbnail), large


def similar_pairs(looks: Looks) -> Iterator[np.ndarray]:
    """Pairs of images with different pixels that look alike, as P×2 arrays of places, a block at a time."""
    grey = looks.thumbnails.astype(np.float32) @ np.asarray([0.299, 0.587, 0.114], dtype=np.float32)
    grey -= grey.mean(axis=(1, 2), keepdims=True)
    norm = np.linalg.norm(grey, axis=(1, 2))
    alone = np.zeros(len(norm), dtype=bool)
    alone[list({content: place for place, content in reversed(list(enumerate(looks.contents)))}.values())] = True
    places = np.flatnonzero(looks.compared & alone & (norm >= LEAST_CONTRAST * SIDE))
    grey = grey[places] / norm[places, None, None]
    colour = looks.thumbnails[places].mean(axis=(1, 2))
    rough = sum((np.diff(grey, axis=axis) ** 2).sum(axis=(1, 2)) for axis in (1, 2)) >= ROUGH
    for members, least, most in ((np.arange(len(places)), CORRELATION, 2.0),
                                 (np.flatnonzero(rough), ROUGH_CORRELATION, CORRELATION)):
        for pairs, likeness in _correlated(grey[members], least):
            pairs = members[pairs[likeness < most]]
            near = np.abs(colour[pairs[:, 0]] - colour[pairs[:, 1]]).mean(axis=1) <= COLOUR
            yield places[pairs[near]]


def _correlated(grey: np.ndarray, least: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of rows of M×16×16 unit vectors that correlate by ``least``, one of them mirrored or not, and how much.

    Unit vectors of correlation c lie sqrt(2 - 2c) apart, and their projections at most that. So only those are compared
    in full whose projections on 32 directions that mirroring does not change are that near: first one of them, by which
    the images are sorted, then all.
    """
    slope = np.linspace(-1, 1, SIDE, dtype=np.float32)
    height = grey.sum(axis=2) @ slope / np.sqrt(SIDE * np.sum(slope**2))
    order = np.argsort(height, kind="stable")
    grey, height = grey[order], height[order]
    squares = (grey + grey[:, :, ::-1])[:, :, : SIDE // 2].reshape(-1, SIDE // 2, 2, SIDE // 4, 2)
    coarse = squares.sum(axis=(2, 4)).reshape(len(grey), SIDE**2 // 8) / np.sqrt(8)
    half, one = (coarse**2).sum(axis=1, keepdims=True) / 2, np.ones((len(grey), 1), dtype=np.float32)
    left, right = np.hstack([coarse, -half, -one]), np.hstack([coarse, one, half])  # product: minus half the distance²
    apart = 2 - 2 * least + 1e-4  # a hair more, for the rounding of float32
    reach = np.searchsorted(height, height + np.sqrt(apart), side="right")
    for start in range(0, len(grey), _BLOCK):
        stop = min(start + _BLOCK, len(grey))
        end = int(reach[stop - 1])
        found = np.flatnonzero(left[start:stop] @ right[start:end].T >= -apart / 2)
        pairs = np.stack(np.divmod(found, end - start), axis=1) + start
        pairs = pairs[pairs[:, 0] < pairs[:, 1]]
        for part in np.array_split(pairs, 1 + len(pairs) // 2**16):
            images, others = grey[part[:, 0]], grey[part[:, 1]]
            ways = [np.einsum("nij,nij->n", images, each) for each in (others, others[:, :, ::-1])]
            likeness = np.maximum(*ways)
            yield order[part[likeness >= least]], likeness[likeness >= least]


def group_contents(looks: Looks, groups: Sequence[Any] | None = None, *, alike: bool = True) -> list[bytes]:
    """One key for the images that have to stay together, directly or over others: the smallest content among them.

    Args:
        looks: of the images.
        groups: what each belongs to (a patient, a video, the original of copies); equal values stay together.
        alike: whether images that look alike do.
    """
    above = list(range(len(looks.contents)))

    def root(place: int) -> int:
        while above[place] != place:
            above[place] = above[above[place]]
            place = above[place]
        return place

    def join(one: int, other: int) -> None:
        above[root(one)] = root(other)

    for values in (looks.contents, groups or ()):
        first: dict[Any, int] = {}
        for place, value in enumerate(values):
            join(place, first.setdefault(value, place))
    for pairs in similar_pairs(looks) if alike else ():
        for one, other in pairs.tolist():
            join(one, other)
    smallest: dict[int, bytes] = {}
    for place, content in enumerate(looks.contents):
        smallest[root(place)] = min(content, smallest.get(root(place), content))
    return [smallest[root(place)] for place in range(len(above))]


@dataclass(frozen=True)
class Shared:
    """Images of one part that look like images of another.

    Args:
        parts: names of both.
        images: how many different images of the second have a copy in the first.
        example: place of a copy in each.
    """

    parts: tuple[str, str]
    images: int
    example: tuple[int, int]


def find_shared(looks: Looks, parts: Sequence[str], apart: Callable[[str, str], bool]) -> list[Shared]:
    """Copies in two parts that must not share any.

    Args:
        looks: of all images.
        parts: the part of each image.
        apart: called with two names of parts; whether they must not share images.
    """
    order = {name: place for place, name in enumerate(dict.fromkeys(parts))}
    held: dict[bytes, dict[str, int]] = {}
    for place, content in enumerate(looks.contents):
        held.setdefault(content, {}).setdefault(parts[place], place)
    copies: dict[tuple[str, str], set[bytes]] = {}
    examples: dict[tuple[str, str], tuple[int, int]] = {}

    def add(one: bytes, other: bytes) -> None:
        for first, second in product(held[one].values(), held[other].values()):
            names = (parts[first], parts[second])
            if order[names[0]] < order[names[1]] and apart(*names):
                copies.setdefault(names, set()).add(looks.contents[second])
                examples[names] = min(examples.get(names, (first, second)), (first, second))

    for content in held:
        add(content, content)
    for pairs in similar_pairs(looks):
        for one, other in pairs.tolist():
            add(looks.contents[one], looks.contents[other])
            add(looks.contents[other], looks.contents[one])
    found = sorted(copies, key=lambda names: (order[names[0]], order[names[1]]))
    return [Shared(names, len(copies[names]), examples[names]) for names in found]
