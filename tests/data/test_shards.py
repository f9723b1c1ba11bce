"""Shards of webdataset: splits by name, labels of three kinds, and nothing that would be unpickled."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from hf_immunize.data import Task, TaskArguments, load_source
from hf_immunize.errors import DataError


def write(path, samples):
    """A tar of members by name; arrays become images."""
    with tarfile.open(path, "w") as archive:
        for name, content in samples:
            if isinstance(content, int):
                stream = io.BytesIO()
                Image.fromarray(np.full((8, 8, 3), content, np.uint8)).save(stream, format="PNG")
                content = stream.getvalue()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def samples(first, count, label=lambda number: number % 2):
    for number in range(first, first + count):
        yield f"{number:04}.png", 5 * number
        yield f"{number:04}.cls", str(label(number)).encode()


def test_shards_are_read_by_the_splits_in_their_names(tmp_path):
    root = tmp_path / "shards"
    root.mkdir()
    write(root / "train-000.tar", samples(0, 6))
    write(root / "train-001.tar", samples(6, 6))
    write(root / "test-000.tar", samples(12, 2))
    rows = load_source(str(root), split="train")
    assert len(rows) == 12 and rows["cls"][:4] == [0, 1, 0, 1]
    assert np.asarray(rows[3]["png"])[0, 0].tolist() == [15, 15, 15]
    assert len(load_source(str(root), split="test")) == 2
    with pytest.raises(DataError, match="got 'validation': there is test, train. Set the split|there is train, test"):
        load_source(str(root), split="validation")
    task = Task(TaskArguments(str(root), "builder:digits"), "primary")
    assert task.label_names == ["0", "1"]


@pytest.mark.parametrize(("name", "members", "names"), [
    ("a field of json", lambda n: [(f"{n}.png", 5 * n), (f"{n}.json", json.dumps({"label": "ab"[n % 2]}).encode())],
     ["a", "b"]),
    ("folders in it", lambda n: [(f"{('cat', 'dog')[n % 2]}/{n}.png", 5 * n)], ["cat", "dog"]),
])  # fmt: skip
def test_labels_of_a_single_shard(tmp_path, name, members, names):
    write(tmp_path / "rows.tar", [member for number in range(12) for member in members(number)])
    assert Task(TaskArguments(str(tmp_path / "rows.tar"), "builder:digits"), "primary").label_names == names


def test_files_that_would_be_unpickled_are_refused_before_they_are_read(tmp_path):
    write(tmp_path / "rows.tar", [("0.png", 1), ("0.pth", b"cos\nsystem\n")])
    with pytest.raises(DataError, match=r"expected images, .cls, .json and .txt in .*rows.tar, got '0.pth'"):
        load_source(str(tmp_path / "rows.tar"))
