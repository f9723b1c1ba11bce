"""Rows that belong together stay together: group_column; and the builder that needs it."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset, load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_immunize.data import Task, TaskArguments
from hf_immunize.data.builders import BUILDERS, digits, scattered_digits
from hf_immunize.data.near_duplicates import Looks, group_contents
from hf_immunize.errors import DataError


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """120 frames of 40 videos in two classes, with one frame that two videos share; saved to disk."""
    draw = np.random.default_rng(0)
    frames = [draw.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in range(120)]
    frames[3] = frames[0]
    table = {"image": [Image.fromarray(frame) for frame in frames], "label": [row % 2 for row in range(120)],
             "video": [f"v{row % 40}" for row in range(120)], "empty": [None] * 120}  # fmt: skip
    folder = tmp_path_factory.mktemp("videos")
    Dataset.from_dict(table).save_to_disk(folder)
    return str(folder)


def sides(task: Task) -> dict[str, list[int]]:
    return {split: rows for split, (_, rows) in task.looks().items()}


def test_rows_of_one_group_never_straddle_two_splits(videos):
    grouped = sides(Task(TaskArguments(videos, videos, group_column="video"), "harmful"))
    where = {}
    for split, rows in grouped.items():
        for row in rows:
            where.setdefault(row % 40, set()).add(split)
    assert all(len(found) == 1 for found in where.values()) and sum(map(len, grouped.values())) == 120
    assert where[0] == where[3]  # a frame of both
    alone = sides(Task(TaskArguments(videos, videos), "harmful"))
    assert any(row % 40 in {other % 40 for other in alone["test"]} for row in alone["attack"])


def test_one_side_may_have_a_column_of_its_own_and_the_options_are_part_of_the_task(videos):
    arguments = TaskArguments(videos, videos, harmful_group_column="video")
    assert sides(Task(arguments, "primary")) == sides(Task(TaskArguments(videos, videos), "primary"))
    shared = TaskArguments(videos, videos, group_column="video")
    assert sides(Task(arguments, "harmful")) == sides(Task(shared, "harmful"))
    assert arguments.described()["harmful_group_column"] == "video"
    assert "group_column" not in TaskArguments(videos, videos).described()  # fingerprints of before stay


def test_a_group_that_cannot_be_read_is_refused(videos):
    with pytest.raises(DataError, match="expected column 'patient' in the primary dataset.*got .*'video'"):
        Task(TaskArguments(videos, videos, group_column="patient"), "primary")
    with pytest.raises(DataError, match="text or an integer in column 'empty' of the harmful dataset, got None in row"):
        Task(TaskArguments(videos, videos, harmful_group_column="empty"), "harmful")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=25))
def test_keys_are_the_components_of_contents_and_groups(pairs):
    contents, groups = [bytes([one]) for one, _ in pairs], [other for _, other in pairs]
    looks = Looks(contents, np.zeros((len(pairs), 16, 16, 3), np.uint8), np.zeros(len(pairs), bool))
    keys = group_contents(looks, groups, alike=False)
    parts = [{place} for place in range(len(pairs))]
    for one in range(len(pairs)):  # slow and independent: merge until nothing changes
        for other in range(one):
            if contents[one] == contents[other] or groups[one] == groups[other]:
                first, second = (next(part for part in parts if place in part) for place in (one, other))
                if first is not second:
                    parts.remove(second)
                    first |= second
    assert len(set(keys)) == len(parts)
    assert all({keys[place] for place in part} == {min(contents[place] for place in part)} for part in parts)


def test_scattered_digits_are_the_digits_at_places_that_tell_nothing(tmp_path):
    made, whole = scattered_digits(), digits()
    assert {split: len(rows) for split, rows in made.items()} == {"public": 14_400, "train": 7_176}
    assert not set(made["public"]["original"]) & set(made["train"]["original"])
    places = set()
    for row in (0, 1, 900, 7_000):
        shown = made["train"][row]
        of = whole[shown["original"]]
        canvas, original = np.asarray(shown["image"]), np.asarray(of["image"])
        assert canvas.shape == (16, 16) and shown["label"] == of["label"]
        fits = [(top, left) for top in range(9) for left in range(9)
                if (canvas[top : top + 8, left : left + 8] == original).all() and canvas.sum() == original.sum()]
        assert fits
        places.add(fits[0])
    assert len(places) > 1
    assert scattered_digits()["train"].to_dict()["image"] == made["train"].to_dict()["image"]  # the draw is fixed
    made["train"].save_to_disk(tmp_path / "kept")
    assert load_from_disk(tmp_path / "kept").features == made["train"].features
    assert set(BUILDERS) == {"digits", "scattered_digits", "mnist"}


def test_the_demo_keeps_each_digit_on_one_side():
    name = "builder:scattered_digits"
    task = Task(TaskArguments(name, name, group_column="original"), "harmful")
    table = scattered_digits()["train"]
    held = [{table[row]["original"] for row in rows} for rows in sides(task).values()]
    assert sum(map(len, held)) == 897 == len(set().union(*held))
