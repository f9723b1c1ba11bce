"""Rows of every class in every split: the cuts of a class that lacks one are moved as little as possible.

Notation: a class has n contents in the order of their draws; S splits; ``ends[j]`` of them lie before cut j.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from hf_immunize.errors import DataError

Places = dict[bytes, int]
"""The split of each content, by its number."""


def contents_of_classes(contents: Sequence[bytes], labels: Sequence[int]) -> dict[int, set[bytes]]:
    """The different contents of each class."""
    found: dict[int, set[bytes]] = {}
    for content, label in zip(contents, labels, strict=True):
        found.setdefault(label, set()).add(content)
    return found


def rare_classes(contents: Sequence[bytes], labels: Sequence[int], splits: int) -> dict[int, int]:
    """Classes with fewer different contents than splits, and how many they have."""
    held = contents_of_classes(contents, labels)
    return {label: len(held[label]) for label in sorted(held) if len(held[label]) < splits}


def fill_classes(
    contents: Sequence[bytes],
    labels: Sequence[int],
    draws: Mapping[bytes, float],
    places: Places,
    splits: int,
    *,
    name: str,
    label_names: Sequence[str] | None = None,
) -> None:
    """Change ``places`` where a class lacks a split, and nowhere else.

    Contents of one class alone are moved first, by ``least_moved``; those of several classes only where that is not
    enough, one by one, as long as no class loses its last of a split.

    Raises:
        DataError: a class with fewer different contents than splits, or one that could only get all splits by taking
            the last of another class with the same images.
    """

    def called(label: int) -> str:
        return str(label) if label_names is None else repr(label_names[label])

    if rare := rare_classes(contents, labels, splits):
        told = ", ".join(f"{called(label)} ({count})" for label, count in list(rare.items())[:10])
        raise DataError(
            f"expected at least {splits} different images of each class in {name}, one for each split, got fewer of "
            f"{len(rare)} classes: {told}. Bring more, or leave such classes out (choose other labels; tasks "
            "of classifiers have drop_rare_classes=true)."
        )
    held = contents_of_classes(contents, labels)
    owners = Counter(content for own in held.values() for content in own)
    everywhere = set(range(splits))
    lacking = sorted(label for label, own in held.items() if {places[content] for content in own} != everywhere)
    for label in lacking:
        alone = sorted((content for content in held[label] if owners[content] == 1), key=lambda one: (draws[one], one))
        fixed = {places[content] for content in held[label] if owners[content] > 1}
        needs = [int(split not in fixed) for split in range(splits)]
        if sum(needs) <= len(alone):
            moved = least_moved([places[content] for content in alone], needs)
            places.update(zip(alone, moved, strict=True))
    left = [label for label in lacking if not _repaired(held[label], held, draws, places, splits)]
    if left:
        raise DataError(
            f"expected rows of every class of {name} in every split, got classes {', '.join(map(called, left[:10]))} "
            "that share images with other classes, of which there are too few to share out: remove the images that "
            "have two labels."
        )


def least_moved(places: Sequence[int], needs: Sequence[int]) -> list[int]:
    """Splits of contents in the order of their draws, with ``needs[j]`` of split j at least, moving the fewest.

    Among equal numbers of moves, cuts move over the fewest contents in all, and then downwards.

    Args:
        places: their splits so far, never falling.
        needs: at most as many in all as there are contents.
    """
    count, splits = len(places), len(needs)
    ends = [sum(place <= split for place in places) for split in range(splits)]
    # best[e]: moves, shifts and cuts of the splits so far, the last of which ends before content e
    best: dict[int, tuple[int, int, list[int]]] = {0: (0, 0, [])}
    for split, (end, need) in enumerate(zip(ends, needs, strict=True)):
        start = ends[split - 1] if split else 0
        last = split == splits - 1
        reach = [count] if last else range(max(0, end - splits), min(count, end + splits) + 1)
        following: dict[int, tuple[int, int, list[int]]] = {}
        for cut in reach:
            ways = [
                (moves + cut - at - max(0, min(cut, end) - max(at, start)), shifts + abs(cut - end), [*cuts, cut])
                for at, (moves, shifts, cuts) in best.items() if cut - at >= need
            ]  # fmt: skip
            if ways:
                following[cut] = min(ways)
        best = following
    cuts = best[count][2]
    return [next(split for split, cut in enumerate(cuts) if row < cut) for row in range(count)]


def _repaired(
    own: set[bytes], held: Mapping[int, set[bytes]], draws: Mapping[bytes, float], places: Places, splits: int
) -> bool:
    """Move contents of a class into the splits it lacks, if no class loses its last of a split by that."""

    def spare(content: bytes) -> bool:
        split = places[content]
        return all(
            any(places[other] == split for other in each if other != content)
            for each in held.values() if content in each
        )  # fmt: skip

    for split in range(splits):
        if any(places[content] == split for content in own):
            continue
        free = sorted((abs(places[content] - split), draws[content], content) for content in own if spare(content))
        if not free:
            return False
        places[free[0][2]] = split
    return True
