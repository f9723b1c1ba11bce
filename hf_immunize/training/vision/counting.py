"""One pass over a dataset for what nothing but its rows tells: by one process of a machine, for all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_immunize.data import RowStore, Targets, cache_folder, digest_rows, read_labels, targets_of
from hf_immunize.training.core.distributed import world


def count_labels(dataset: Any, key: str, name: str, *, workers: int = 0) -> Targets:
    """Labels of every row, each row read once by one process of each machine; the others wait for what it found.

    Raises:
        DataError: a row that cannot be read, or labels that cannot be used; on every process.
    """

    def read() -> Tensor:
        return targets_of(read_labels(dataset, key, name, workers=workers), name).values

    return targets_of(read_once(read, len(dataset)), name)


def digest_once(dataset: Any, name: str) -> str:
    """``digest_rows``, each row read once by one process of each machine."""

    def read() -> Tensor:
        return torch.tensor(list(bytes.fromhex(digest_rows(dataset, name))), dtype=torch.uint8)

    return bytes(read_once(read, 32).tolist()).hex()


def read_once(read: Callable[[], Tensor], rows: int) -> Tensor:
    """What ``read`` gives, as a tensor of ``rows`` rows; one process of each machine reads.

    Other processes wait at the lock of a file, not in a collective, which would time out while a large dataset is read.
    """
    if world()[1] == 1:
        return read()

    def batches() -> Iterator[tuple[Tensor, ...]]:
        yield (read(),)

    folder = _folder_of_this_run()
    found = RowStore.open_or_write(folder, batches(), rows).column(0).clone()
    dist.barrier()
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_name(f"{folder.name}.lock").unlink(missing_ok=True)
    return found


def _folder_of_this_run() -> Path:
    """A folder that the processes of one run have in common, and no other run."""
    token = [uuid.uuid4().hex]
    dist.broadcast_object_list(token, src=0)
    return cache_folder("labels") / token[0]
