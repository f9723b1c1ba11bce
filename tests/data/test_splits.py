"""Content decides the split; classes are selected and renumbered; fingerprints tell rows and order apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage

from hf_immunize.data import (
    PixelDataset,
    Task,
    TaskArguments,
    fingerprint,
    load_source,
    parse_fractions,
    select_classes,
    split_by_content,
    split_few_by_content,
)
from hf_immunize.data.sources import describe_source
from hf_immunize.errors import DataError


def noise(rows: int, seed: int = 0) -> Dataset:
    generator = np.random.default_rng(seed)
    images = [PILImage.fromarray(generator.integers(0, 255, (6, 6), dtype=np.uint8)) for _ in range(rows)]
    features = Features({"image": Image(), "label": ClassLabel(names=["x", "y", "z"])})
    return Dataset.from_dict({"image": images, "label": [row % 3 for row in range(rows)]}, features)


def contents(dataset) -> set[bytes]:
    return {np.asarray(row["image"]).tobytes() for row in dataset}


def test_duplicates_never_straddle_two_splits_and_nothing_is_lost():
    data = noise(60)
    from datasets import concatenate_datasets

    doubled = concatenate_datasets([data, data.select(range(30))])
    parts = split_by_content(doubled, {"a": 0.5, "b": 0.3, "c": 0.2})
    assert sum(len(part) for part in parts.values()) == 90
    sets = [contents(part) for part in parts.values()]
    assert not (sets[0] & sets[1]) and not (sets[0] & sets[2]) and not (sets[1] & sets[2])


def test_adding_rows_moves_none():
    small = split_by_content(noise(40), {"a": 0.5, "b": 0.5})
    generator_rows = noise(40)
    from datasets import concatenate_datasets

    large = split_by_content(concatenate_datasets([noise(20, seed=9), generator_rows]), {"a": 0.5, "b": 0.5})
    assert contents(small["a"]) <= contents(large["a"])


def test_the_seed_changes_the_split_and_sizes_follow_the_fractions():
    data = noise(400)
    first, second = (split_by_content(data, {"a": 0.75, "b": 0.25}, seed=seed) for seed in (0, 1))
    assert contents(first["a"]) != contents(second["a"])
    assert 0.68 < len(first["a"]) / 400 < 0.82


def test_an_empty_split_is_refused():
    with pytest.raises(DataError, match="rows in every split"):
        split_by_content(noise(1), {"a": 0.5, "b": 0.5})


def test_classes_are_renumbered_in_the_order_asked_for():
    kept, names = select_classes(noise(9), [2, 0], label_column="label", name="x")
    assert names == ["z", "x"]
    assert sorted(kept["label"][:]) == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    "labels,message", [([1], "at least two classes"), ([0, 7], "expected rows of every class.*\\[7\\]")]
)
def test_impossible_classes_are_refused(labels, message):
    with pytest.raises(DataError, match=message):
        select_classes(noise(9), labels, label_column="label", name="x")


@pytest.mark.parametrize("text", ["a=0.5", "a=0.5,b=x", "a=1.5,b=-0.5", "nonsense"])
def test_bad_fractions_are_refused(text):
    with pytest.raises(DataError, match="split"):
        parse_fractions(text)


def test_a_fingerprint_changes_with_a_pixel_a_label_and_the_order():
    pixels, labels = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 0, 1])
    base = PixelDataset(pixels, labels, ["a", "b"])
    changed = pixels.clone()
    changed[3, 0, 0, 0] += 1e-6
    others = [
        PixelDataset(changed, labels, ["a", "b"]),
        PixelDataset(pixels, 1 - labels, ["a", "b"]),
        base.subset(torch.tensor([1, 0, 2, 3])),
    ]
    digests = {fingerprint(each, source="s", role="r").sha256 for each in [base, *others]}
    assert len(digests) == 4
    assert fingerprint(base, source="s", role="r").classes == {"a": 2, "b": 2}


def test_a_task_loads_folders_and_parquet_alike(tmp_path):
    data = noise(60)
    for row, item in enumerate(data):
        folder = tmp_path / "images" / "train" / ["x", "y", "z"][item["label"]]
        folder.mkdir(parents=True, exist_ok=True)
        item["image"].convert("RGB").save(folder / f"{row}.png")
    data.to_parquet(tmp_path / "rows.parquet")
    found = [load_source(str(tmp_path / name)) for name in ("images", "rows.parquet")]
    assert [len(each) for each in found] == [60, 60]
    assert describe_source(str(tmp_path / "rows.parquet")) == "rows.parquet"


def test_a_builder_function_can_be_named_and_a_wrong_source_says_what_is_possible():
    assert len(load_source(f"builder:{__name__}:sixty")) == 60
    with pytest.raises(DataError, match="builder:NAME"):
        load_source("builder:nothing")
    with pytest.raises(DataError, match="importable function"):
        load_source("builder:no_such_module:build")


def test_an_id_that_the_hub_does_not_have_is_no_folder_either(monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("no such dataset")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(DataError, match="expected a Hub id, an image folder.*no such folder here, and the Hub gave no"):
        load_source("not/there")


def sixty() -> Dataset:
    return noise(60)


def test_the_digits_tasks_share_no_image(digits_primary):
    primary, harmful, processor = digits_primary
    rows = {}
    for task, roles in ((primary, ("train", "validation", "test")), (harmful, ("defense", "attack", "test"))):
        for role in roles:
            rows[task.side, role] = {image.numpy().tobytes() for image in task.pixels(role, processor).pixel_values}
    assert sum(len(part) for part in rows.values()) == len(set().union(*rows.values())) > 1500
    with pytest.raises(DataError, match="expected a split of the primary task"):
        primary.pixels("defense", processor)


def test_label_lists_must_be_numbers():
    with pytest.raises(DataError, match="comma-separated class ids"):
        Task(TaskArguments("builder:digits", "builder:digits", primary_labels="one,two"), "primary")


@given(
    contents=st.lists(st.integers(0, 8), min_size=3, max_size=20).filter(lambda rows: len(set(rows)) >= 3),
    seed=st.integers(0, 5),
)
def test_a_handful_of_images_fills_every_split_and_equal_ones_stay_together(contents, seed):
    digests = [bytes([content]) for content in contents]
    parts = split_few_by_content(digests, {"a": 0.6, "b": 0.1, "c": 0.3}, seed=seed)
    rows = [row for held in parts.values() for row in held]
    assert sorted(rows) == list(range(len(contents))) and all(parts.values())
    sides = [{contents[row] for row in held} for held in parts.values()]
    assert sum(map(len, sides)) == len(set(contents))
    shuffled = split_few_by_content(digests[::-1], {"a": 0.6, "b": 0.1, "c": 0.3}, seed=seed)
    assert [{contents[::-1][row] for row in held} for held in shuffled.values()] == sides


def test_splits_of_many_images_have_the_sizes_asked_for_and_too_few_are_refused():
    digests = [bytes([row]) for row in range(100)]
    parts = split_few_by_content(digests, {"a": 0.35, "b": 0.35, "c": 0.1, "d": 0.2})
    assert [len(held) for held in parts.values()] == [35, 35, 10, 20]
    assert parts != split_few_by_content(digests, {"a": 0.35, "b": 0.35, "c": 0.1, "d": 0.2}, seed=1)
    with pytest.raises(DataError, match="at least 2 different images, one for each of .*, got 1"):
        split_few_by_content([b"x", b"x"], {"a": 0.5, "b": 0.5})
