"""Every class is in every split, equal images on one side; where the plain rule did that already, nothing moves."""

from __future__ import annotations

import hashlib
from itertools import combinations_with_replacement

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from image_builders import table, write_images

from hf_immunize.data import HARMFUL_SPLITS, Task, TaskArguments, assign_splits, split_by_content
from hf_immunize.data.class_splits import least_moved
from hf_immunize.errors import DataError

FRACTIONS = [
    {"train": 0.5, "test": 0.5}, {"train": 0.5, "validation": 0.2, "test": 0.3}, HARMFUL_SPLITS,
    {"defense": 0.97, "attack": 0.01, "validation": 0.01, "test": 0.01},
]  # fmt: skip


def content(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


def plain_rule(numbers, fractions, seed) -> list[str]:
    """The split of each row by the rule of the first release, written again: the draw of its content alone."""
    found = []
    for number in numbers:
        draw = int.from_bytes(hashlib.sha256(content(number) + str(seed).encode()).digest()[:8], "big") / 2**64
        edges = np.cumsum(list(fractions.values()))
        found.append(list(fractions)[min(int((edges <= draw).sum()), len(fractions) - 1)])
    return found


def splits_of(numbers, labels, fractions, seed=0) -> list[str]:
    parts = assign_splits([content(number) for number in numbers], labels, fractions, seed=seed)
    side = {row: split for split, rows in parts.items() for row in rows}
    assert sorted(side) == list(range(len(numbers))) == sorted(row for rows in parts.values() for row in rows)
    return [side[row] for row in range(len(numbers))]


def lacking(splits, labels, fractions) -> set[int]:
    held: dict[int, set[str]] = {}
    for split, label in zip(splits, labels, strict=True):
        held.setdefault(label, set()).add(split)
    return {label for label, own in held.items() if own != set(fractions)}


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=2, max_size=6),
    repeats=st.lists(st.integers(0, 40), max_size=10),
    fractions=st.sampled_from(FRACTIONS),
    seed=st.integers(0, 50),
    shuffle=st.randoms(use_true_random=False),
)
def test_each_class_of_enough_images_is_in_each_split_by_content_alone(sizes, repeats, fractions, seed, shuffle):
    """For any class sizes and repeated images: all of it, in any row order, and no more moved than must be."""
    own = [(number, label) for label, size in enumerate(sizes) for number in range(100 * label, 100 * label + size)]
    rows = own + [own[place % len(own)] for place in repeats]
    numbers, labels = zip(*rows, strict=True)
    if min(sizes) < len(fractions):
        rare = [label for label, size in enumerate(sizes) if size < len(fractions)]
        told = ", ".join(f"{label} ({sizes[label]})" for label in rare)
        with pytest.raises(DataError) as caught:
            splits_of(numbers, labels, fractions, seed)
        assert told in str(caught.value) and "drop_rare_classes" in str(caught.value)
        return
    splits = splits_of(numbers, labels, fractions, seed)
    assert not lacking(splits, labels, fractions)
    assert all(len({split for other, split in zip(numbers, splits, strict=True) if other == number}) == 1
               for number in set(numbers))
    order = list(range(len(rows)))
    shuffle.shuffle(order)
    again = splits_of([numbers[row] for row in order], [labels[row] for row in order], fractions, seed)
    assert again == [splits[row] for row in order]
    before = plain_rule(numbers, fractions, seed)
    poor = lacking(before, labels, fractions)
    assert all(split == old for split, old, label in zip(splits, before, labels, strict=True) if label not in poor)


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2)), min_size=6, max_size=40),
    fractions=st.sampled_from(FRACTIONS[:3]),
    seed=st.integers(0, 20),
)
def test_equal_images_under_two_labels_stay_on_one_side(rows, fractions, seed):
    numbers, labels = zip(*rows, strict=True)
    held = {label: {number for number, own in rows if own == label} for label in labels}
    assume(all(len(own) >= len(fractions) for own in held.values()))
    try:
        splits = splits_of(numbers, labels, fractions, seed)
    except DataError as error:  # classes that share nearly all of their images
        assert "share images with other classes" in str(error)
        shared = {number for number in numbers if sum(number in own for own in held.values()) > 1}
        assert any(len(own - shared) < len(fractions) for own in held.values())
        return
    assert not lacking(splits, labels, fractions)
    sides = {number: {split for other, split in zip(numbers, splits, strict=True) if other == number}
             for number in numbers}
    assert all(len(side) == 1 for side in sides.values())


def test_classes_of_the_same_images_get_all_splits_together():
    numbers, labels = [*range(8), *range(8)], [0] * 8 + [1] * 8
    for seed in range(30):
        assert not lacking(splits_of(numbers, labels, HARMFUL_SPLITS, seed), labels, HARMFUL_SPLITS)


@settings(max_examples=300, deadline=None)
@given(
    places=st.lists(st.integers(0, 3), min_size=4, max_size=8),
    needs=st.lists(st.integers(0, 1), min_size=4, max_size=4),
)
def test_the_fewest_images_move(places, needs):
    """Against a search over every way to cut."""
    places = sorted(places)
    moved = least_moved(places, needs)
    assert moved == sorted(moved) and all(moved.count(split) >= need for split, need in enumerate(needs))
    ways = [way for way in combinations_with_replacement(range(4), len(places))
            if all(way.count(split) >= need for split, need in enumerate(needs))]
    fewest = min(sum(old != new for old, new in zip(places, way, strict=True)) for way in ways)
    assert sum(old != new for old, new in zip(places, moved, strict=True)) == fewest


def test_102_classes_of_10_images_are_split_for_every_seed():
    numbers, labels = list(range(1020)), [number // 10 for number in range(1020)]
    for seed in range(20):
        before = plain_rule(numbers, HARMFUL_SPLITS, seed)
        assert lacking(before, labels, HARMFUL_SPLITS)
        splits = splits_of(numbers, labels, HARMFUL_SPLITS, seed)
        assert not lacking(splits, labels, HARMFUL_SPLITS)
        assert sum(old != new for old, new in zip(before, splits, strict=True)) < 80


def test_a_tasks_classes_are_all_in_all_splits_and_images_are_those_of_the_plain_rule(tmp_path):
    data = table(80, names=tuple("abcdefgh"))
    data.to_parquet(tmp_path / "x.parquet")
    task = Task(TaskArguments(str(tmp_path / "x.parquet"), "unused"), "primary")
    held = task.looks()
    plain = split_by_content(data, {"train": 0.5, "validation": 0.2, "test": 0.3})
    assert [len(part) for part in plain.values()] != [len(looks.contents) for looks, _ in held.values()]
    for _, rows in held.values():
        assert {row % 8 for row in rows} == set(range(8))
    assert sorted(row for _, rows in held.values() for row in rows) == list(range(80))


def test_rare_classes_are_named_or_on_demand_left_out(tmp_path, warned):
    sizes = {"a": 6, "rare": 2, "b": 7, "single": 1}
    names = [f"{name}/{number}.png" for name, size in sizes.items() for number in range(size)]
    source = str(write_images(tmp_path / "d", names))
    arguments = TaskArguments(source, source)
    with pytest.raises(DataError, match=r"at least 3 different .* of 2 classes: 'rare' \(2\), 'single' \(1\)"):
        Task(arguments, "primary")
    arguments.drop_rare_classes = True
    task = Task(arguments, "primary")
    assert task.label_names == ["a", "b"]
    assert warned() == [
        "the primary dataset: drop_rare_classes left out 2 of 4 classes, which have fewer different images than the 3 "
        "splits: 'rare' (2), 'single' (1)."
    ]
    assert sum(len(looks.contents) for looks, _ in task.looks().values()) == 13
    arguments.harmful_splits = "defense=0.2,attack=0.2,validation=0.1,more=0.1,again=0.1,last=0.1,test=0.2"
    with pytest.raises(DataError, match=r"at least two classes of 7 different images or more .*got \['b'\]"):
        Task(arguments, "harmful")


def test_repeated_images_do_not_make_a_class_large(tmp_path):
    data = table(40)
    rows = [*range(0, 40, 2), 1, 1, 1, 3, 3]
    data.select(rows).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"fewer of 1 classes: 'b' \(2\)"):
        Task(TaskArguments(str(tmp_path / "x.parquet"), "unused"), "primary")
