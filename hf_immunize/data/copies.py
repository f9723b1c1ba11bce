"""Images that two splits or two sides of a task have in common."""

from __future__ import annotations

from typing import Protocol

from transformers.utils import logging

from hf_immunize.data.near_duplicates import Looks, Shared, find_shared
from hf_immunize.errors import DataError

logger = logging.get_logger(__name__)


class Side(Protocol):
    """One side of a task, ``Task``."""

    side: str

    def looks(self) -> dict[str, tuple[Looks, list[int]]]:
        """What each split's images look like, and their rows in the source."""

    def contents(self) -> set[tuple[bytes, str]]:
        """Digest of the pixels and class of each image, of all splits."""


_DEFENDER = {"primary train", "primary validation", "harmful defense"}


def warn_of_copies(*tasks: Side) -> list[Shared]:
    """Tell, in one warning each, which splits share images that are equal or look alike; return them.

    Of one task no two splits may share any. Of several tasks, what the defender sees (primary train and validation,
    harmful defense) must be apart from what it is judged on (every other split).
    """
    held = [(f"{task.side} {split}", looks, rows) for task in tasks for split, (looks, rows) in task.looks().items()]
    sides = {name: name.split(" ")[0] for name, _, _ in held}

    def apart(one: str, other: str) -> bool:
        if len(tasks) == 1:
            return True
        return sides[one] != sides[other] and (one in _DEFENDER) != (other in _DEFENDER)

    looks = Looks.joined([looks for _, looks, _ in held])
    found = find_shared(looks, [name for name, looks, _ in held for _ in looks.contents], apart)
    rows = [row for _, _, rows in held for row in rows]
    for shared in found:
        first, second = (rows[place] for place in shared.example)
        logger.warning(
            f"{shared.images} images of {shared.parts[1]} look like some of {shared.parts[0]}, e.g. rows {second} and "
            f"{first} of the source: resized, encoded again or mirrored copies let a figure on one profit from the "
            f"other. {_REMEDY[len(tasks) == 1]}"
        )
    return found


_REMEDY = {
    True: "Remove them, or set group_near_duplicates=true, which keeps such images in one split.",
    False: "Remove them from one of the two tasks.",
}


def refuse_one_task(primary: Side, harmful: Side) -> None:
    """Raise DataError where every harmful image is a primary one of the same class; tell, where some are."""
    wanted = harmful.contents()
    both = wanted & primary.contents()
    if not both:
        return
    told = ", ".join(sorted({name for _, name in both})[:6])
    told = f"{len(both)} of {len(wanted)} harmful images are primary images of the same class ({told})"
    remedy = "Name the classes of each side (primary_labels, harmful_labels), or another source."
    if len(both) == len(wanted):
        raise DataError(f"expected other images as harmful than as primary, got one task for both: {told}. {remedy}")
    logger.warning(f"{told}: the model is to keep them and not to learn them. {remedy}")
