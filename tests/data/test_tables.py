"""Tables give the asked split alone, as the same files would on the Hub; what cannot be loaded says why."""

from __future__ import annotations

import json
import sys
import time

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset
from image_builders import noise, table, write_classes, write_images

from hf_immunize.data import load_source
from hf_immunize.data.sources import describe_source
from hf_immunize.errors import DataError


def colours(data) -> list[bytes]:
    return [row["image"].convert("RGB").tobytes() for row in data]


@pytest.fixture
def snapshot(tmp_path):
    """A local copy of a Hub dataset: README.md and sharded parquet files."""
    folder = tmp_path / "hub"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A dataset\n")
    table(40).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    table(20, start=100).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    return folder


@pytest.mark.parametrize("names", [("train.parquet", "test.parquet"), ("my-train-1.parquet", "my-test-1.parquet"),
                                   ("train/0.parquet", "test/0.parquet")])
def test_a_folder_of_parquet_files_gives_the_asked_split_alone(tmp_path, names):
    for name, data in zip(names, (table(40), table(20, start=100)), strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        data.to_parquet(tmp_path / name)
    assert colours(load_source(str(tmp_path))) == colours(table(40))
    assert colours(load_source(str(tmp_path), split="test")) == colours(table(20, start=100))
    with pytest.raises(DataError, match="got 'validation': there is train, test"):
        load_source(str(tmp_path), split="validation")


def test_a_snapshot_of_a_hub_dataset_is_read_as_datasets_reads_it(snapshot):
    for split, rows in (("train", 40), ("test", 20), ("train+test", 60), ("test[:5]", 5)):
        data = load_source(str(snapshot), split=split)
        assert len(data) == rows and data.features["label"].names == ["a", "b"]
        assert colours(data) == colours(load_dataset(str(snapshot), split=split))
    with pytest.raises(DataError, match="got 'dev': there is train, test"):
        load_source(str(snapshot), split="dev")


def test_configurations_of_a_readme_say_what_is_a_split(tmp_path):
    for name, rows in (("one", 4), ("two", 6), ("three", 8)):
        table(rows, start=rows * 10).to_parquet(tmp_path / f"{name}.parquet")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: small\n  data_files:\n  - split: train\n    path: one.parquet\n"
        "  - split: test\n    path: two.parquet\n- config_name: large\n  data_files: three.parquet\n---\n"
    )
    assert len(load_source(str(tmp_path), config="small", split="test")) == 6
    assert len(load_source(str(tmp_path), config="large")) == 8
    with pytest.raises(DataError, match="'huge' not found. Available: .'small', 'large'"):
        load_source(str(tmp_path), config="huge")
    (tmp_path / "README.md").write_text("---\nconfigs: [\n---\n")
    with pytest.raises(DataError, match="README.md with a readable YAML block"):
        load_source(str(tmp_path))


def test_a_builder_is_found_where_its_user_stands(tmp_path, monkeypatch):
    text = "def rows():\n    import builders_of_tables\n    return builders_of_tables.made\n"
    (tmp_path / "made_by_me.py").write_text(text)
    made = "import datasets\nmade = datasets.Dataset.from_dict({'x': [1, 2]})\n"
    (tmp_path / "builders_of_tables.py").write_text(made)
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert load_source("builder:made_by_me:rows")["x"][:] == [1, 2]
    assert sys.path == before


def test_classes_whose_names_look_like_nothing_are_classes(tmp_path):
    for number in range(4):
        table(4)[number]["image"].save(tmp_path / f"{number}.png")
    (tmp_path / "rows.csv").write_text("image,label\n0.png,None\n1.png,NA\n2.png,null\n3.png,dent\n")
    assert load_source(str(tmp_path / "rows.csv"))["label"][:] == ["None", "NA", "null", "dent"]


def test_files_that_a_readme_names_are_read_again_once_they_change(tmp_path):
    """``datasets`` keeps what it read of such a folder under what README.md says, whatever became of the files."""
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train, path: rows.parquet}\n---\n"
    )
    for rows in (4, 8):
        table(rows).to_parquet(tmp_path / "rows.parquet")
        assert len(load_source(str(tmp_path))) == rows
    table(8, start=40).to_parquet(tmp_path / "rows.parquet")
    first = load_source(str(tmp_path))[0]["image"]
    assert first.tobytes() == table(8, start=40)[0]["image"].tobytes()
    again = load_source(str(tmp_path))
    assert again.cache_files == load_source(str(tmp_path)).cache_files, "unchanged files are prepared once"


def test_files_that_belong_to_no_split_are_named(tmp_path, warned):
    table(4).to_parquet(tmp_path / "train.parquet")
    table(6).to_parquet(tmp_path / "extra.parquet")
    assert len(load_source(str(tmp_path))) == 4
    (line,) = warned()
    assert "left out 1 files that belong to no split of it, such as extra.parquet" in line


def test_parquet_files_of_any_name_are_one_split(tmp_path):
    for number in range(3):
        table(4, start=10 * number).to_parquet(tmp_path / f"part{number}.parquet")
    (tmp_path / "._part0.parquet").write_bytes(b"\0\5\x16\7")
    assert len(load_source(str(tmp_path))) == 12


def test_a_file_is_one_split(tmp_path):
    table(4).to_parquet(tmp_path / "rows.parquet")
    table(6).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    assert len(load_source(str(tmp_path / "rows.parquet"))) == 4
    assert len(load_source(str(tmp_path / "test-00000-of-00001.parquet"))) == 6
    assert len(load_source(str(tmp_path / "test-00000-of-00001.parquet"), split="test")) == 6
    with pytest.raises(DataError, match="got 'test': there is train"):
        load_source(str(tmp_path / "rows.parquet"), split="test")


@pytest.mark.parametrize("suffix,column", [("csv", "image"), ("csv", "file_name"), ("tsv", "photo"), ("jsonl", "image"),
                                           ("ndjson", "file_name"), ("json", "image")])
def test_text_tables_name_image_files_beside_them(tmp_path, suffix, column):
    write_images(tmp_path / "photos", ["1.png", "2.png", "3.png"])
    rows = [{column: f"photos/{number}.png", "label": label} for number, label in ((2, "dog"), (1, "cat"), (3, "dog"))]
    if suffix in ("csv", "tsv"):
        sep = "\t" if suffix == "tsv" else ","
        text = "\n".join([sep.join(rows[0]), *(sep.join(row.values()) for row in rows)])
    else:
        text = json.dumps(rows) if suffix == "json" else "\n".join(map(json.dumps, rows))
    (tmp_path / f"rows.{suffix}").write_text(text)
    for source in (tmp_path / f"rows.{suffix}", tmp_path):
        data = load_source(str(source))
        name = "image" if column == "file_name" else column
        assert [row[name].tobytes() for row in data] == [noise(number).tobytes() for number in (1, 0, 2)]
        assert data["label"][:] == ["dog", "cat", "dog"]
    (tmp_path / "photos" / "3.png").unlink()
    with pytest.raises(DataError, match="an image file for every row .* got 'photos/3.png' in row 2 .1 such rows"):
        load_source(str(tmp_path / f"rows.{suffix}"))


@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: {"bytes": data, "path": None}])
def test_encoded_images_in_a_table_without_types_are_images(tmp_path, wrap):
    import io

    encoded = []
    for number in range(4):
        buffer = io.BytesIO()
        noise(number).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"image": [wrap(each) for each in encoded], "label": [0, 1, 0, 1]}), tmp_path / "x.parquet")
    assert colours(load_source(str(tmp_path / "x.parquet"))) == [noise(number).tobytes() for number in range(4)]


def test_folders_of_save_to_disk(tmp_path):
    table(5).save_to_disk(str(tmp_path / "one"))
    DatasetDict(train=table(4), test=table(6)).save_to_disk(str(tmp_path / "both"))
    assert len(load_source(str(tmp_path / "one"))) == 5
    assert [len(load_source(str(tmp_path / "both"), split=split)) for split in ("train", "test")] == [4, 6]
    with pytest.raises(DataError, match="got 'validation': there is train, test"):
        load_source(str(tmp_path / "both"), split="validation")
    with pytest.raises(DataError, match="got 'test': there is train"):
        load_source(str(tmp_path / "one"), split="test")
    arrow = next((tmp_path / "one").glob("*.arrow"))
    assert colours(load_source(str(arrow))) == colours(table(5))


def test_a_table_beside_a_picture_is_read_and_tables_beside_class_folders_are_refused(tmp_path):
    table(6).to_parquet(tmp_path / "train.parquet")
    write_images(tmp_path, ["assets/logo.png"])
    assert len(load_source(str(tmp_path))) == 6
    write_classes(tmp_path, ["cat", "dog"])
    with pytest.raises(DataError, match=r"expected class folders or tables in .*got both.*'train.parquet'"):
        load_source(str(tmp_path))


@pytest.mark.parametrize("source", ["./nix", "/nix/da", "~/nix", "a/b/c", "nix.parquet", "owner/nix.csv", "nix/", "..",
                                    "C:\\photos", "photos.zip"])
def test_a_path_that_is_not_there_says_so_and_is_not_looked_for_on_the_hub(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    if source == "..":
        with pytest.raises(DataError, match="with no files"):
            load_source(source)
        return
    start = time.monotonic()
    with pytest.raises(DataError, match="there is no such file or folder. Check the path"):
        load_source(source)
    assert time.monotonic() - start < 2


def test_what_could_be_a_hub_id_says_that_it_is_neither(monkeypatch):
    import datasets

    def nothing(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", nothing)
    with pytest.raises(DataError, match="no such folder here, and the Hub gave no such dataset: ConnectionError"):
        load_source("owner/name")


def test_a_revision_reaches_the_hub_and_options_that_a_source_does_not_have_are_refused(monkeypatch, snapshot):
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or table(2))
    load_source("owner/name", config="c", split="test", revision="abc")
    assert asked == [(("owner/name", "c"), {"split": "test", "revision": "abc"})]
    for source, options in ((str(snapshot), {"revision": "abc"}), ("builder:digits", {"revision": "abc"}),
                            ("builder:digits", {"config": "c"})):
        with pytest.raises(DataError, match=f"expected no {next(iter(options))} '"):
            load_source(source, **options)


def test_files_that_are_not_read_say_what_is(tmp_path):
    (tmp_path / "x.zip").write_bytes(b"PK")
    for source in (tmp_path / "x.zip", tmp_path):
        with pytest.raises(DataError, match="expected a Hub id, an image folder, a .parquet, .*(x.zip|1 .zip)"):
            load_source(str(source))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match="expected a Hub id, .*broken.parquet"):
        load_source(str(tmp_path / "broken.parquet"))


def both() -> DatasetDict:
    return DatasetDict(train=table(4), test=table(6))


def numbers() -> list[int]:
    return [1, 2]


def broken() -> Dataset:
    raise AttributeError("inside")


def test_builders_give_datasets_of_one_or_more_splits():
    assert len(load_source(f"builder:{__name__}:both", split="test")) == 6
    with pytest.raises(DataError, match="got 'test': there is train"):
        load_source("builder:digits", split="test")
    with pytest.raises(DataError, match="expected a datasets.Dataset or DatasetDict .* got list"):
        load_source(f"builder:{__name__}:numbers")
    with pytest.raises(AttributeError, match="inside"):
        load_source(f"builder:{__name__}:broken")
    assert __name__ in sys.modules


def test_labels_without_names_stay_as_they_are(tmp_path):
    features = Features({"image": table(1).features["image"], "label": Value("int64")})
    table(3).cast(features).to_parquet(tmp_path / "x.parquet")
    data = load_source(str(tmp_path / "x.parquet"))
    assert not isinstance(data.features["label"], ClassLabel) and data["label"][:] == [0, 1, 0]


def test_a_source_is_described_without_its_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert describe_source(str(tmp_path)) == describe_source(".") == tmp_path.name
    assert describe_source("owner/name") == "owner/name" and describe_source("builder:digits") == "builder:digits"
