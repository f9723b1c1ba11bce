"""Runs shared by processes: whoever is free takes the next one, and a process that dies gives its run back."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from hf_immunize.errors import ConfigError


@dataclass(frozen=True)
class Share:
    """Which part of an exam a process makes.

    Args:
        rank, size: the process among those that share one folder. They take runs from one queue, so that these only
            say which process speaks and where it begins to look.
        part, parts: a fixed part of the jobs, for processes that cannot see each other (an array of jobs): job j is
            made by part j mod ``parts``. None: all of them.
    """

    rank: int = 0
    size: int = 1
    part: int = 0
    parts: int = 1

    def holds(self, job: int) -> bool:
        """Whether a job belongs to this part."""
        return job % self.parts == self.part

    def with_part(self, text: str | None) -> Share:
        """This process with the part that ``--shard i/n`` names, counted from 1. Raises ConfigError for other text."""
        if text is None:
            return self
        part, _, parts = text.partition("/")
        if not (part.strip().isdigit() and parts.strip().isdigit() and 1 <= int(part) <= int(parts)):
            raise ConfigError(f"expected shard as i/n with 1 <= i <= n, e.g. 1/4, got {text!r}.")
        return Share(self.rank, self.size, int(part) - 1, int(parts))


_OF_LAUNCHER = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
_PREFIXES = ("TORCHELASTIC_", "FSDP_", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_MIXED_PRECISION")


def leave_group() -> Share:
    """Take what ``accelerate launch`` or torchrun said out of the environment: from here on the process is on its own.

    Attackers train with the stock Trainer, which would spread one run over all processes. Each process sees one GPU of
    those that the machine shows, by its local rank; call this before CUDA is used.
    """
    share = Share(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    if share.size > 1:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if shown := [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]:
            os.environ["CUDA_VISIBLE_DEVICES"] = shown[local % len(shown)]
        elif "CUDA_VISIBLE_DEVICES" not in os.environ and (count := _gpus()):
            os.environ["CUDA_VISIBLE_DEVICES"] = str(local % count)
    for name in list(os.environ):
        if name in _OF_LAUNCHER or name.startswith(_PREFIXES):
            del os.environ[name]
    return share


def _gpus() -> int:
    """GPUs of this machine, counted without using one."""
    import torch

    return int(torch.cuda.device_count())


class Claims:
    """Jobs of one folder that somebody is at: a locked file each, which the system unlocks when a process dies.

    Locks are ``filelock``'s. They work between processes of one machine, and between machines where their shared
    folder carries locks; where it does not, two may make the same run, and the second trace, of equal content, replaces
    the first in one move.
    """

    def __init__(self, folder: Path):
        self._folder = folder

    @contextmanager
    def take(self, job: str) -> Iterator[bool]:
        """Hold a job as long as the block lasts; False where somebody else holds it."""
        lock = FileLock(self._folder / f"{job}.lock", blocking=False, thread_local=False)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except (Timeout, FileNotFoundError):  # held, or the folder is being cleared by one who is done
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def clear(self) -> None:
        """Remove the files of locks; one that somebody holds goes on to work for him."""
        shutil.rmtree(self._folder, ignore_errors=True)
        with suppress(OSError):
            self._folder.parent.rmdir()  # where it was the last
