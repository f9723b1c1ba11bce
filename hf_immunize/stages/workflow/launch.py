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


@dataclass(frozen=True)
class Launcher:
    """How stages are started.

    Args:
        hardware: option file of ``accelerate launch``.
        num_processes: its option of this name.
        threads: of every process, for its linear algebra.
    """

    hardware: str | None = None
    num_processes: int | None = None
    threads: int = 1

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
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(self.threads)}
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
