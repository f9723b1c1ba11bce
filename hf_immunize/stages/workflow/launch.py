"""Stages as processes: the words that start one, alone or through ``accelerate launch``, and how one is ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_immunize.stages.workflow.stages import Stage

_PATIENCE = 20.0
"""Seconds that a stage has to leave in, once it was asked to."""


def threads_beside(processes: int) -> int:
    """Threads for the linear algebra of each of several processes: what OMP_NUM_THREADS says, else a share of the cores
    that this process may use. More threads than cores wait for one another."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    if told.isdecimal() and int(told):
        return int(told)
    affinity = getattr(os, "sched_getaffinity", None)  # a batch system may lend a few cores of many
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, cores // processes)


@dataclass(frozen=True)
class Launcher:
    """How stages are started.

    Args:
        hardware: option file of ``accelerate launch``.
        num_processes: its option of this name.
        jobs: stages that run at the same time.
    """

    hardware: str | None = None
    num_processes: int | None = None
    jobs: int = 1

    def words(self, stage: Stage, options: Path) -> list[str]:
        """The command of a stage. Training and exams are shared by several processes; the others are one."""
        verb = ["hf_immunize.cli", stage.verb, "--config", str(options)]
        if not stage.is_shared or (self.hardware is None and self.num_processes is None):
            return [sys.executable, "-m", *verb]
        told = [] if self.hardware is None else ["--config_file", self.hardware]
        told += [] if self.num_processes is None else ["--num_processes", str(self.num_processes)]
        return [sys.executable, "-m", "accelerate.commands.launch", *told, "--module", *verb]

    def start(self, stage: Stage, options: Path, log: Path, held: Sequence[int] = ()) -> subprocess.Popen[Any]:
        """Start a stage in a group of processes of its own; what it prints goes to the end of ``log``.

        Args:
            held: open files that the stage shall hold as long as it lives.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        processes = self.jobs * ((self.num_processes or 1) if stage.is_shared else 1)
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(threads_beside(processes))}
        with open(log, "ab") as stream:
            stream.write(f"$ hf-immunize {stage.verb} --config {options}\n".encode())
            stream.flush()
            return subprocess.Popen(
                self.words(stage, options), stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT,
                env=environment, pass_fds=tuple(held), start_new_session=True,
            )  # fmt: skip


def end(process: subprocess.Popen[Any]) -> None:
    """End a stage and all that it started."""
    for sign, patience in ((signal.SIGTERM, _PATIENCE), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, sign)
        except (ProcessLookupError, PermissionError):
            return
        try:
            process.wait(patience)
            return
        except subprocess.TimeoutExpired:
            continue
