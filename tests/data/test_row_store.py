"""A store is complete or it is not there, whatever happens to its writer."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_immunize.data import RowStore
from hf_immunize.errors import RecordError


def whole(rows: int = 8) -> list[tuple[torch.Tensor, ...]]:
    return [(torch.randn(2, 3), torch.arange(2 * place, 2 * place + 2)) for place in range(rows // 2)]


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_what_is_read_is_what_was_written(tmp_path_factory, sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    batches = [
        (torch.randn(size, 2, 3, generator=generator).to(torch.bfloat16), torch.arange(size)) for size in sizes
    ]
    store = RowStore.open_or_write(tmp_path_factory.mktemp("store") / "x", iter(batches), sum(sizes))
    assert len(store) == sum(sizes)
    for column in range(2):
        read = torch.stack([store[row][column] for row in range(len(store))])
        assert torch.equal(read, torch.cat([batch[column] for batch in batches]))


def test_a_killed_writer_leaves_nothing_that_counts(tmp_path):
    folder = tmp_path / "store"
    script = Path(__file__).parent / "killed_writer.py"
    done = subprocess.run([sys.executable, str(script), str(folder)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = list(tmp_path.glob("store.*.part"))
    assert len(left) == 1 and RowStore.open(folder) is None
    store = RowStore.open_or_write(folder, iter(whole()), 8)
    assert len(store) == 8 and not list(tmp_path.glob("store.*.part"))


def test_a_store_that_is_there_is_not_written_again(tmp_path):
    RowStore.open_or_write(tmp_path / "store", iter(whole()), 8)

    def never():
        raise AssertionError("written twice")
        yield

    assert len(RowStore.open_or_write(tmp_path / "store", never(), 8)) == 8


def test_a_batch_that_fails_leaves_no_store(tmp_path):
    def broken():
        yield whole()[0]
        raise ValueError("image 3")

    with pytest.raises(ValueError, match="image 3"):
        RowStore.open_or_write(tmp_path / "store", broken(), 8)
    assert RowStore.open(tmp_path / "store") is None and not list(tmp_path.glob("*.part"))


def test_damage_lack_of_space_and_a_changing_dataset_are_named(tmp_path, monkeypatch):
    folder = tmp_path / "store"
    with pytest.raises(RecordError, match="expected 8 rows for store, got 6"):
        RowStore.open_or_write(folder, iter(whole(6)), 8)
    RowStore.open_or_write(folder, iter(whole()), 8)
    with (folder / "column-0.raw").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(RecordError, match="97 bytes in column-0.raw instead of 96: delete the folder"):
        RowStore.open(folder)
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(RecordError, match="set feature_cache_dir to a larger disk"):
        RowStore.open_or_write(tmp_path / "other", iter(whole()), 8)
