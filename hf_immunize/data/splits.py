"""Splits by content hash: equal images always land on the same side."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from hf_immunize.data.class_splits import fill_classes
from hf_immunize.data.fingerprint import digest_pixels
from hf_immunize.data.rows import read_image
from hf_immunize.errors import DataError

PRIMARY_SPLITS = {"train": 0.5, "validation": 0.2, "test": 0.3}
BENIGN_SPLITS = {"attack": 0.5, "validation": 0.2, "test": 0.3}
HARMFUL_SPLITS = {"defense": 0.35, "attack": 0.35, "validation": 0.1, "test": 0.2}


PROBE_SPLIT = "probe"
"""Harmful rows of the defender's that are not trained on."""


def parse_fractions(text: str) -> dict[str, float]:
    """``"train=0.5,test=0.5"`` as a dict. Raises DataError unless the fractions are positive and sum to 1."""
    try:
        fractions = {name.strip(): float(value) for name, value in (part.split("=") for part in text.split(","))}
    except ValueError as error:
        raise DataError(f"expected splits like 'train=0.5,test=0.5', got {text!r}: {error}.") from error
    if any(value <= 0 for value in fractions.values()) or abs(sum(fractions.values()) - 1) > 1e-9:
        raise DataError(f"expected positive split fractions that sum to 1, got {fractions}.")
    return fractions


def split_by_content(
    dataset: Any,
    fractions: Mapping[str, float],
    *,
    image_column: str = "image",
    seed: int = 0,
    name: str = "the dataset",
    labels: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Assign each row to a split by the SHA-256 of its decoded pixels and ``seed``.

    A row's split depends on nothing but its own content, so duplicates never straddle two splits and adding rows
    moves none. Sizes are therefore close to the fractions, not equal to them. With ``labels``, every class is in every
    split: see ``assign_splits``.

    Raises:
        DataError: a missing image column, an image that cannot be decoded, a split left without rows, or a class with
            fewer different images than splits.
    """
    if image_column not in dataset.column_names:
        raise DataError(f"expected column '{image_column}', got {dataset.column_names}: set image_column.")
    contents = [
        digest_pixels(np.asarray(read_image(dataset, row, image_column, name))) for row in range(len(dataset))
    ]
    chosen = assign_splits(contents, labels, fractions, seed=seed, name=name)
    return {split: dataset.select(rows) for split, rows in chosen.items()}


def assign_splits(
    contents: Sequence[bytes],
    labels: Sequence[int] | None,
    fractions: Mapping[str, float],
    *,
    seed: int = 0,
    name: str = "the dataset",
    label_names: Sequence[str] | None = None,
) -> dict[str, list[int]]:
    """Rows of every split: equal contents on one side, and rows of every class in every split.

    A content's draw is the SHA-256 of it and ``seed`` as a number in 0..1; the fractions cut 0..1 into splits. Where
    that leaves a class without rows in some split, the cuts of this class alone are moved, over as few of its contents
    as possible. Contents that two labels share stay where they are unless a class cannot do without moving them.

    Args:
        contents: digest of each row.
        labels: class of each row; None asks for rows in every split alone.
        fractions: share of each split, in order.
        seed: of the draws.
        name, label_names: of the dataset and its classes, for errors.

    Raises:
        DataError: a split left without rows, or a class with fewer different contents than splits.
    """
    cuts = np.cumsum(list(fractions.values()))
    draws = {content: _draw(content, seed) for content in set(contents)}
    places = {content: min(int(np.searchsorted(cuts, draw, side="right")), len(cuts) - 1)
              for content, draw in draws.items()}
    if labels is not None:
        fill_classes(contents, labels, draws, places, len(cuts), name=name, label_names=label_names)
    chosen: dict[str, list[int]] = {split: [] for split in fractions}
    splits = list(fractions)
    for row, content in enumerate(contents):
        chosen[splits[places[content]]].append(row)
    if empty := [split for split, rows in chosen.items() if not rows]:
        raise DataError(
            f"expected rows in every split of {name}, got none in {empty} of {len(contents)} rows: bring more data."
        )
    return chosen


def _draw(content: bytes, seed: int) -> float:
    return int.from_bytes(hashlib.sha256(content + str(seed).encode()).digest()[:8], "big") / 2**64


def split_few_by_content(
    digests: Sequence[bytes], fractions: Mapping[str, float], *, seed: int = 0
) -> dict[str, list[int]]:
    """Rows of every split for a handful of images, where hashes alone would leave splits empty.

    Different contents are put in the order of the SHA-256 of their digest and ``seed``, and cut where the fractions
    say, each split getting at least one. Equal contents land on one side. Adding images can move others.

    Raises:
        DataError: fewer different contents than splits.
    """
    places: dict[bytes, list[int]] = {}
    for row, digest in enumerate(digests):
        places.setdefault(hashlib.sha256(digest + str(seed).encode()).digest(), []).append(row)
    count, names = len(places), list(fractions)
    if count < len(names):
        raise DataError(f"expected at least {len(names)} different images, one for each of {names}, got {count}.")
    edges = [0]
    for index, share in enumerate(np.cumsum(list(fractions.values()))):
        most = count - (len(names) - 1 - index)
        edges.append(min(most, max(edges[-1] + 1, round(float(share) * count))))
    ordered = [places[key] for key in sorted(places)]
    return {
        name: sorted(row for rows in ordered[first:last] for row in rows)
        for name, (first, last) in zip(names, pairwise(edges), strict=True)
    }
