"""A sub-folder is a class whatever it is called; split folders are told by structure; what is left out is counted."""

from __future__ import annotations

import os
import tempfile
import unicodedata
from pathlib import Path

import pytest
from datasets import load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from image_builders import noise, write_classes, write_images

from hf_immunize.data import load_source
from hf_immunize.errors import DataError

SPLIT_WORDS = ["train", "test", "val", "validation", "dev", "eval", "training", "Test"]
PLAIN = ["freight train", "test pattern", "car", "Bücher", "鳥", "e\u0301t", "__unknown__", "a-b", "a", "dev kit", "10"]
JUNK = [".svn/q.png", ".DS_Store", "Thumbs.db", "__MACOSX/car/._0.png", "desktop.ini", ".ipynb_checkpoints/x.png"]


def classes_of(data) -> dict[str, int]:
    names = data.features["label"].names
    labels = data["label"][:]
    return {name: labels.count(place) for place, name in enumerate(names)}


@pytest.mark.parametrize("names", [
    ("freight train", "passenger train", "bus", "car"),
    ("train", "car", "plane"),
    ("test", "car"),
    ("train", "test"),
    ("validation", "val", "dev"),
    ("Bücher", "鳥", "naïve"),
    ("__unknown__", "_", "a b"),
])
def test_one_sub_folder_for_each_class_gives_exactly_these_classes(tmp_path, names):
    data = load_source(str(write_classes(tmp_path / "d", names)))
    assert classes_of(data) == dict.fromkeys(sorted(names), 3)
    assert {Path(path).parent.name for path in paths_of(data)} == set(names)


def paths_of(data) -> list[str]:
    from datasets import Image

    return [row["path"] for row in data.cast_column("image", Image(decode=False))["image"]]


@settings(max_examples=60, deadline=None)
@given(
    plain=st.lists(st.sampled_from(PLAIN), max_size=5, unique=True),
    words=st.lists(st.sampled_from(SPLIT_WORDS), max_size=4, unique_by=str.lower),
    nested=st.lists(st.sampled_from(["", "more/", "more/still/", "train/"]), min_size=1, max_size=3, unique=True),
    junk=st.lists(st.sampled_from(JUNK), max_size=4, unique=True),
    suffix=st.sampled_from([".png", ".PNG", ".jpeg", ".JPG"]),
    odd=st.text(st.characters(min_codepoint=33, max_codepoint=0x2FFF, exclude_categories=["Cs", "Cc", "Cn"],
                              exclude_characters="/.\\"), min_size=1, max_size=8),
)
def test_classes_are_the_sub_folders_under_any_names_and_beside_any_junk(plain, words, nested, junk, suffix, odd):
    """Whichever names, nested folders, hidden files: the classes are the sub-folders, and every image is there."""
    names = [*plain, *words]
    if odd.lower() not in {name.lower() for name in names} | {"__macosx", "thumbs", "@eadir"}:
        names.append(odd)
    if len(names) < 2:
        return
    with tempfile.TemporaryDirectory() as root:
        write_images(Path(root), [f"{name}/{place}{number}{suffix}" for name in names for number in range(2)
                                  for place in ["", *nested]])
        for name in junk:
            path = Path(root, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"no image")
        data = load_source(root)
        each = 2 * len({"", *nested})
        assert classes_of(data) == dict.fromkeys(data.features["label"].names, each)
        assert set(data.features["label"].names) == set(names)
        assert all(row["image"].size == (8, 8) for row in data)


def test_rows_and_ids_are_those_of_datasets_imagefolder_where_that_reads_classes(tmp_path):
    write_images(tmp_path, ["b/2.png", "b/10.png", "a/x.png", "a-b/y.png", "B/z.png"])
    mine, theirs = load_source(str(tmp_path)), load_dataset("imagefolder", data_dir=str(tmp_path), split="train")
    assert paths_of(mine) == paths_of(theirs)
    assert mine.features["label"].names == theirs.features["label"].names and mine["label"][:] == theirs["label"][:]


def test_folders_called_by_numbers_have_these_numbers_as_ids(tmp_path):
    names = load_source(str(write_classes(tmp_path / "d", map(str, range(12)), each=1))).features["label"].names
    assert names == [str(number) for number in range(12)]
    mixed = load_source(str(write_classes(tmp_path / "e", ["10", "9", "x"], each=1))).features["label"].names
    assert mixed == ["10", "9", "x"]


def test_images_stay_paths_until_a_row_is_read(tmp_path):
    data = load_source(str(write_classes(tmp_path / "d", "ab")))
    (tmp_path / "d" / "a" / "0.png").write_bytes(b"broken after loading")
    assert data.data.nbytes < 10_000 and data[1]["image"].size == (8, 8)


def test_links_are_followed_once_and_a_link_to_nothing_is_named(tmp_path):
    write_classes(tmp_path / "elsewhere", ["x"], each=2)
    root = write_classes(tmp_path / "d", ["a"], each=2)
    (root / "b").symlink_to(tmp_path / "elsewhere" / "x", target_is_directory=True)
    (root / "a" / "round").symlink_to(root, target_is_directory=True)
    (root / "a" / "9.png").symlink_to(tmp_path / "elsewhere" / "x" / "0.png")
    assert classes_of(load_source(str(root))) == {"a": 3, "b": 2}
    (root / "b" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(DataError, match=r"b/gone.png in .*a link to nothing"):
        load_source(str(root))


@pytest.mark.parametrize("held,asked,found", [
    (("train", "test"), "test", "test"),
    (("train", "val", "test"), "validation", "val"),
    (("Train", "Test"), "train", "Train"),
    (("training", "eval"), "test", "eval"),
    (("test", "eval"), "eval", "eval"),
    (("data/train", "data/test"), "test", "data/test"),
])
def test_split_folders_with_class_folders_in_them_give_the_asked_split_alone(tmp_path, held, asked, found):
    for place, name in enumerate(held):
        write_classes(tmp_path / name, ["b", "a", f"only {place}"], each=2 + place, start=100 * place)
    data = load_source(str(tmp_path), split=asked)
    assert {os.path.relpath(path, tmp_path).split(found)[0] for path in paths_of(data)} == {""}
    place = held.index(found)
    assert len(data) == 3 * (2 + place)
    assert data.features["label"].names == ["a", "b", *(f"only {number}" for number in range(len(held)))]


def test_parts_and_sums_of_splits_are_those_of_datasets(tmp_path):
    for place, name in enumerate(("train", "test")):
        write_classes(tmp_path / name, "ab", each=2 + place, start=100 * place)
    assert len(load_source(str(tmp_path), split="train+test")) == 10
    assert len(load_source(str(tmp_path), split="test[:50%]")) == 3
    with pytest.raises(DataError, match="expected a split like train or train"):
        load_source(str(tmp_path), split="test[a]")


@pytest.mark.parametrize("files,message", [
    (["train/a/1.png", "train/b/1.png", "test/1.png"], r"class folders in \['train'\], and images directly in"),
    (["images_train/a/1.png", "images_train/b/1.png", "images_test/a/1.png", "images_test/b/1.png"],
     r"the same sub-folders \['a', 'b'\] in each of \['images_test', 'images_train'\]"),
    (["train/a/1.png", "train/b/1.png", "test/a/1.png", "test/b/1.png", "car/1.png"], "the same sub-folders"),
])
def test_what_can_be_read_both_ways_is_refused(tmp_path, files, message):
    with pytest.raises(DataError, match=f"got both readings: .*{message}"):
        load_source(str(write_images(tmp_path, files)))


def test_a_split_that_is_not_there_names_those_that_are(tmp_path):
    for name in ("train", "val"):
        write_classes(tmp_path / "s" / name, "ab")
    with pytest.raises(DataError, match="got 'test': there is train, val"):
        load_source(str(tmp_path / "s"), split="test")
    with pytest.raises(DataError, match=r"sub-folders \['test', 'train'\] hold images .* got 'test': there is train"):
        load_source(str(write_classes(tmp_path / "c", ["train", "test"])), split="test")
    for name in ("val", "dev"):
        write_classes(tmp_path / "t" / name, "ab")
    with pytest.raises(DataError, match=r"one folder of split 'validation' in .*, got \['dev', 'val'\]"):
        load_source(str(tmp_path / "t"), split="validation")


def test_what_is_left_out_is_counted(tmp_path, warned):
    root = write_classes(tmp_path / "d", "ab")
    write_images(root, ["loose.png", ".svn/1.png", "a/.hidden.png"], start=50)
    junk = ("Thumbs.db", "a/._0.png", "__MACOSX/a/._0.png")
    for name in ("a/1.heic", "a/2.HEIC", "b/notes.txt", "list.csv", "LICENSE", *junk):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    (root / "empty").mkdir()
    (root / "raw").mkdir()
    (root / "raw" / "1.heic").write_bytes(b"x")
    assert classes_of(load_source(str(root))) == {"a": 3, "b": 3}
    (line,) = warned()
    assert line.startswith(
        "d: left out 1 .csv, 3 .heic, 1 .txt, 1 without a suffix, 5 hidden or system files, "
        "1 images that lie in no class folder, folders without an image: empty, raw;"
    )


def test_a_metadata_file_with_labels_goes_before_folders_and_names_its_images(tmp_path, warned):
    root = write_images(tmp_path / "d", ["images/1.png", "images/2.png", "images/3.png"])
    (root / "metadata.csv").write_text("file_name,label\nimages/2.png,dog\nimages/1.png,cat\n")
    data = load_source(str(root))
    assert [Path(path).name for path in paths_of(data)] == ["2.png", "1.png"] and data["label"][:] == ["dog", "cat"]
    assert warned() == ["d: left out 1 images that metadata.csv does not name."]
    (root / "metadata.csv").write_text("file_name,label\nimages/1.png,dog\nimages/9.png,cat\n")
    with pytest.raises(DataError, match="got 'images/9.png' in row 1"):
        load_source(str(root))


def test_metadata_of_split_folders_and_above_them(tmp_path):
    root = write_images(tmp_path / "d", ["train/1.png", "train/2.png", "test/3.png"])
    (root / "metadata.jsonl").write_text(
        "".join(f'{{"file_name": "{name}", "label": {place}}}\n' for place, name in
                enumerate(["train/1.png", "test/3.png", "train/2.png"]))
    )
    assert load_source(str(root))["label"][:] == [0, 2] and load_source(str(root), split="test")["label"][:] == [1]
    (root / "metadata.jsonl").unlink()
    for name, files in (("train", ["1.png", "2.png"]), ("test", ["3.png"])):
        (root / name / "metadata.csv").write_text("file_name,label\n" + "".join(f"{file},{name}\n" for file in files))
    assert load_source(str(root), split="test")["label"][:] == ["test"]


def test_metadata_without_labels_leaves_the_class_folders(tmp_path, warned):
    root = write_classes(tmp_path / "d", "ab", each=1)
    (root / "metadata.csv").write_text("file_name,text\na/0.png,one\nb/0.png,two\n")
    assert classes_of(load_source(str(root))) == {"a": 1, "b": 1}
    assert warned() == ["d: left out metadata.csv: no file_name in it, or class folders and no labels."]


def test_a_folder_without_images_says_what_is_in_it(tmp_path):
    (tmp_path / "1.heic").write_bytes(b"x")
    (tmp_path / ".DS_Store").write_bytes(b"x")
    with pytest.raises(DataError, match="with 1 .heic, 1 hidden or system files"):
        load_source(str(tmp_path))
    (tmp_path / "e").mkdir()
    with pytest.raises(DataError, match="with no files"):
        load_source(str(tmp_path / "e"))


def test_images_without_folders_have_no_label_column(tmp_path):
    data = load_source(str(write_images(tmp_path, ["1.png", "2.png"])))
    assert data.column_names == ["image"] and data[0]["image"].tobytes() == noise(0).tobytes()


def test_names_keep_the_letters_they_have_on_disk(tmp_path):
    names = [unicodedata.normalize(form, "Äpfel") for form in ("NFC", "NFD")]
    found = load_source(str(write_classes(tmp_path / "d", names, each=1))).features["label"].names
    assert sorted(found) == sorted(names)


def test_a_name_that_is_not_utf_8_is_named(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    write_classes(tmp_path, "ab", each=1)
    with open(folder + b"/1.png", "wb") as file:
        noise(1).save(file, "PNG")
    with pytest.raises(DataError, match="expected names in UTF-8"):
        load_source(str(tmp_path))
