"""Resized, encoded again and mirrored copies are found; different digits, noise and flat images are not."""

from __future__ import annotations

import io

import numpy as np
import pytest
from image_builders import noise, scene
from PIL import Image as PILImage
from PIL import ImageOps

from hf_immunize.data import Task, TaskArguments, load_source, refuse_one_task, warn_of_copies
from hf_immunize.data.near_duplicates import find_shared, group_contents, read_looks, similar_pairs
from hf_immunize.errors import DataError


def looks_of(images):
    return read_looks([{"image": image} for image in images], range(len(images)), "image", "the images")


def pairs_of(images) -> set[tuple[int, int]]:
    return {tuple(sorted(pair)) for pairs in similar_pairs(looks_of(images)) for pair in pairs.tolist()}


def jpeg(image, quality: int):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return PILImage.open(buffer).convert("RGB")


COPIES = {
    "half": lambda image: image.resize((48, 48), PILImage.Resampling.BICUBIC),
    "double": lambda image: image.resize((192, 192), PILImage.Resampling.LANCZOS),
    "jpeg": lambda image: jpeg(image, 60),
    "mirrored": ImageOps.mirror,
    "mirrored half jpeg": lambda image: jpeg(ImageOps.mirror(image).resize((48, 48)), 75),
    "a little brighter": lambda image: image.point(lambda level: min(255, round(level * 1.05))),
}


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("make", [scene, lambda number: noise(number, 96)], ids=["scene", "noise"])
def test_each_copy_is_found_and_nothing_else(copy, make):
    images = [make(number) for number in range(40)]
    assert pairs_of([*images, *map(copy, images)]) == {(place, 40 + place) for place in range(40)}


def photo_tiles() -> list:
    from sklearn.datasets import load_sample_images

    return [PILImage.fromarray(photo[top : top + 96, left : left + 96]) for photo in load_sample_images().images
            for top in range(0, 330, 96) for left in range(0, 544, 96)]


def test_cropped_copies_are_mostly_not_found():
    """A limit: two pixels less on each side of 96 move every edge of a thumbnail."""
    tiles = photo_tiles()
    assert len(pairs_of([*tiles, *(tile.crop((2, 2, 94, 94)) for tile in tiles)])) < 0.5 * len(tiles)


def test_photos_are_told_from_each_other_and_their_copies_found():
    """Tiles of scikit-learn's two photos: neighbours share colours and texture, and are no copies."""
    tiles = photo_tiles()
    found = pairs_of([*tiles, *(jpeg(ImageOps.mirror(tile), 80) for tile in tiles)])
    assert all(other == one + len(tiles) for one, other in found)
    assert len(found) > 0.8 * len(tiles)  # the rest is blurred background without contrast


def test_digits_of_any_size_are_not_copies_of_each_other():
    digits = load_source("builder:digits")
    assert pairs_of([row["image"].convert("RGB") for row in digits]) == set()
    enlarged = [row["image"].convert("RGB").resize((64, 64), PILImage.Resampling.BICUBIC) for row in digits]
    assert len(pairs_of(enlarged)) <= 4  # of 1.6 million pairs


def test_flat_and_small_images_are_not_compared():
    flat = [PILImage.new("RGB", (64, 64), (value, value, value)) for value in range(20)]
    small = [scene(number, 96).resize((24, 24)) for number in (1, 1, 2, 2)]
    assert pairs_of([*flat, *small, *(image.resize((31, 96)) for image in small)]) == set()


def test_the_same_shapes_in_other_colours_are_no_copies():
    shapes = np.asarray(scene(1).convert("L"))
    painted = [PILImage.fromarray(np.stack([shapes // 2 + colour for colour in colours], axis=-1).astype(np.uint8))
               for colours in ((0, 0, 100), (100, 0, 0), (0, 100, 0))]
    assert pairs_of(painted) == set()


def test_groups_hold_copies_of_copies_and_do_not_depend_on_the_order():
    images = [scene(1), scene(2), COPIES["half"](scene(1)), ImageOps.mirror(scene(1)), scene(1)]
    keys = group_contents(looks_of(images))
    assert [keys.index(key) for key in keys] == [0, 1, 0, 0, 0]
    assert group_contents(looks_of(images[::-1])) == keys[::-1]


def test_shared_images_are_counted_with_an_example():
    images = [scene(0), scene(1), COPIES["half"](scene(0)), scene(5), ImageOps.mirror(scene(1)), scene(0)]
    (found,) = find_shared(looks_of(images), ["a", "a", "b", "b", "b", "b"], lambda one, other: True)
    assert (found.parts, found.images, found.example) == (("a", "b"), 3, (0, 2))
    assert find_shared(looks_of(images), ["a", "a", "b", "b", "b", "b"], lambda one, other: False) == []


@pytest.fixture
def copied(tmp_path):
    """Two classes of 30 scenes, each of which is there a second time, smaller."""
    for number in range(60):
        folder = tmp_path / "d" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        scene(number).save(folder / f"{number}.png")
        scene(number).resize((64, 64)).save(folder / f"{number} small.jpg", quality=90)
    return str(tmp_path / "d")


def sides(task) -> dict[str, set[int]]:
    """The number of the scene of each row, by split."""
    from pathlib import Path

    from datasets import Image

    stored = load_source(task.source).cast_column("image", Image(decode=False))["image"][:]
    return {split: {int(Path(stored[row]["path"]).stem.split(" ")[0]) for row in rows}
            for split, (_, rows) in task.looks().items()}


def test_copies_in_two_splits_are_told_and_on_demand_kept_together(copied, warned):
    task = Task(TaskArguments(copied, copied), "harmful")
    lines = warned()
    assert lines and all("look like some of harmful" in line and "group_near_duplicates=true" in line for line in lines)
    told = {(line.split(" images of ")[1].split(" look")[0], line.split("some of ")[1].split(",")[0]):
            int(line.split(" ")[0]) for line in lines}
    held, names = sides(task), list(task.looks())
    expected = {(f"harmful {later}", f"harmful {first}"): len(held[first] & held[later])
                for place, first in enumerate(names) for later in names[place + 1 :] if held[first] & held[later]}
    assert told == expected and sum(told.values()) > 20
    grouped = Task(TaskArguments(copied, copied, group_near_duplicates=True), "harmful")
    assert warned() == []
    parts = list(sides(grouped).values())
    assert sum(map(len, parts)) == 60 == len(set().union(*parts))


def test_two_tasks_may_not_share_what_one_is_trained_and_the_other_judged_on(tmp_path, warned):
    for number in range(48):
        for folder, image in (("one", scene(number)), ("two", ImageOps.mirror(scene(number + 40)))):
            path = tmp_path / folder / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    arguments = TaskArguments(str(tmp_path / "one"), str(tmp_path / "two"))
    primary, harmful = Task(arguments, "primary"), Task(arguments, "harmful")
    assert warned() == []
    found = warn_of_copies(primary, harmful)
    defender = {"primary train", "primary validation", "harmful defense"}
    assert found and all((shared.parts[0] in defender) != (shared.parts[1] in defender) for shared in found)
    mine, theirs = sides(primary), sides(harmful)
    expected = sum(
        len({number - 40 for number in mine[one]} & theirs[other]) for one in mine for other in theirs
        if (f"primary {one}" in defender) != (f"harmful {other}" in defender)
    )
    assert sum(shared.images for shared in found) == expected > 0
    assert len(warned()) == len(found)


def test_equal_images_of_two_tasks_are_told_however_small(tmp_path, warned):
    arguments = TaskArguments("builder:digits", "builder:digits", primary_labels="0,1", harmful_labels="1,2")
    found = warn_of_copies(Task(arguments, "primary"), Task(arguments, "harmful"))
    assert sum(shared.images for shared in found) > 50
    apart = TaskArguments("builder:digits", "builder:digits", primary_labels="0,1", harmful_labels="3,2")
    warned()
    assert warn_of_copies(Task(apart, "primary"), Task(apart, "harmful")) == []
    assert not [line for line in warned() if "look like" in line]


def test_among_three_thousand_images_every_copy_is_found():
    images = [scene(number, 48) for number in range(1500)]
    looks = looks_of([*images, *map(ImageOps.mirror, images)])
    assert sum(len(pairs) for pairs in similar_pairs(looks)) == 1500


@pytest.mark.parametrize("labels", [{}, {"primary_labels": "0,1,2", "harmful_labels": "2,1"}])
def test_harmful_images_that_are_all_kept_are_refused(labels):
    """However the two sides are split: other fractions put an image into other splits."""
    arguments = TaskArguments("builder:digits", "builder:digits", **labels)
    with pytest.raises(DataError, match="got one task for both.*primary_labels, harmful_labels"):
        refuse_one_task(Task(arguments, "primary"), Task(arguments, "harmful"))


def test_harmful_classes_that_are_kept_as_well_are_told(warned):
    """As where harmful_labels is left out, which means all classes."""
    arguments = TaskArguments("builder:digits", "builder:digits", primary_labels="0,1", harmful_labels="1,2")
    primary, harmful = Task(arguments, "primary"), Task(arguments, "harmful")
    warned()
    refuse_one_task(primary, harmful)
    (told,) = warned()
    ones = sum(name == "1" for _, name in primary.contents())
    assert told.startswith(f"{ones} of {len(harmful.contents())} harmful images are primary images of the same class")


def test_the_same_images_by_other_classes_are_another_task(tmp_path, warned):
    """Who is on a photo may be harmful to learn, and what is on it may not."""
    rows = load_source("builder:digits", config=None, split="train", revision=None)
    both = rows.add_column("odd", [("even", "odd")[label % 2] for label in rows["label"]])
    both.to_parquet(tmp_path / "digits.parquet")
    source = str(tmp_path / "digits.parquet")
    arguments = TaskArguments(source, source, harmful_label_column="odd")
    primary, harmful = Task(arguments, "primary"), Task(arguments, "harmful")
    warned()
    refuse_one_task(primary, harmful)
    assert warned() == [] and len(harmful.contents()) > 1000
