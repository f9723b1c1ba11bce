"""Class selection and splits by content hash: equal images always land on the same side."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from hf_immunize.data.fingerprint import digest_pixels
from hf_immunize.data.rows import read_image
from hf_immunize.errors import DataError

PRIMARY_SPLITS = {"train": 0.5, "validation": 0.2, "test": 0.3}
BENIGN_SPLITS = {"attack": 0.5, "validation": 0.2, "test": 0.3}
HARMFUL_SPLITS = {"defense": 0.35, "attack": 0.35, "validation": 0.1, "test": 0.2}


def parse_fractions(text: str) -> dict[str, float]:
    """``"train=0.5,test=0.5"`` as a dict. Raises DataError unless the fractions are positive and sum to 1."""
    try:
        fractions = {name.strip(): float(value) for name, value in (part.split("=") for part in text.split(","))}
    except ValueError as error:
        raise DataError(f"expected splits like 'train=0.5,test=0.5', got {text!r}: {error}.") from error
    if any(value <= 0 for value in fractions.values()) or abs(sum(fractions.values()) - 1) > 1e-9:
        raise DataError(f"expected positive split fractions that sum to 1, got {fractions}.")
    return fractions


def select_classes(
    dataset: Any, labels: Sequence[int] | None, *, label_column: str, name: str
) -> tuple[Any, list[str]]:
    """Keep the given class ids, renumbered 0..C-1 in the given order; return the dataset and the class names.

    Raises:
        DataError: a missing label column, fewer than two classes, or a class with no rows.
    """
    if label_column not in dataset.column_names:
        raise DataError(
            f"expected column '{label_column}' in {name}, got {dataset.column_names}: set label_column."
        )
    present = np.asarray(dataset[label_column][:])
    wanted = list(labels) if labels is not None else sorted(set(present.tolist()))
    if len(wanted) < 2:
        raise DataError(f"expected at least two classes in {name}, got {wanted}: choose more labels.")
    missing = [label for label in wanted if not (present == label).any()]
    if missing:
        raise DataError(f"expected rows of every class in {name}, got none of {missing}: check labels and split.")
    feature = dataset.features[label_column]
    names = [feature.int2str(label) if hasattr(feature, "int2str") else str(label) for label in wanted]
    renumber = {label: index for index, label in enumerate(wanted)}
    rows = [row for row, label in enumerate(present.tolist()) if label in renumber]
    kept = dataset.select(rows)
    kept = kept.remove_columns(label_column).add_column(label_column, [renumber[present[row]] for row in rows])
    return kept, names


def split_by_content(
    dataset: Any,
    fractions: Mapping[str, float],
    *,
    image_column: str = "image",
    seed: int = 0,
    name: str = "the dataset",
) -> dict[str, Any]:
    """Assign each row to a split by the SHA-256 of its decoded pixels and ``seed``.

    A row's split depends on nothing but its own content, so duplicates never straddle two splits and adding rows
    moves none. Sizes are therefore close to the fractions, not equal to them.

    Raises:
        DataError: a missing image column, an image that cannot be decoded, or a split left without rows.
    """
    if image_column not in dataset.column_names:
        raise DataError(f"expected column '{image_column}', got {dataset.column_names}: set image_column.")
    edges = np.cumsum(list(fractions.values()))
    chosen: dict[str, list[int]] = {name: [] for name in fractions}
    names = list(fractions)
    for row in range(len(dataset)):
        digest = digest_pixels(np.asarray(read_image(dataset, row, image_column, name)))
        draw = int.from_bytes(hashlib.sha256(digest + str(seed).encode()).digest()[:8], "big") / 2**64
        chosen[names[min(int(np.searchsorted(edges, draw, side="right")), len(names) - 1)]].append(row)
    empty = [name for name, rows in chosen.items() if not rows]
    if empty:
        raise DataError(f"expected rows in every split, got none in {empty} of {len(dataset)} rows: bring more data.")
    return {name: dataset.select(rows) for name, rows in chosen.items()}


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
