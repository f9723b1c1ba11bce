"""One pass over a dataset for the labels that nothing but its rows tells: by one process of a machine, for all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from hf_immunize.data import RowStore, Targets, read_labels, targets_of
from hf_immunize.training.core.distributed import world
from hf_immunize.training.vision.frozen import default_folder


def count_labels(dataset: Any, key: str, name: str, *, workers: int = 0) -> Targets:
    """Labels of every row, each row read once by one process of each machine; the others wait for what it found.

    They wait at the lock of a file, not in a collective, which would time out while a large dataset is read.

    Raises:
        DataError: a row that cannot be read, or labels that cannot be used; on every process.
    """

    def read() -> Targets:
        return targets_of(read_labels(dataset, key, name, workers=workers), name)

    if world()[1] == 1:
        return read()

    def batches() -> Iterator[tuple[Tensor, ...]]:
        yield (read().values,)

    folder = _folder_of_this_run()
    store = RowStore.open_or_write(folder, batches(), len(dataset))
    found = targets_of(store.column(0).clone(), name)
    del store
    dist.barrier()
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_name(f"{folder.name}.lock").unlink(missing_ok=True)
    return found


def _folder_of_this_run() -> Path:
    """A folder that the processes of one run have in common, and no other run."""
    token = [uuid.uuid4().hex]
    dist.broadcast_object_list(token, src=0)
    return default_folder().with_name("labels") / token[0]
