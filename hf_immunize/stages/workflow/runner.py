"""Run the stages of a run file: what is fresh is left, what is not is run as soon as what it needs is there."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from hf_immunize.errors import ConfigError, StageError
from hf_immunize.stages.workflow.display import Display
from hf_immunize.stages.workflow.launch import Launcher, end
from hf_immunize.stages.workflow.live import ProgressPage
from hf_immunize.stages.workflow.stages import Stage, depending, waiting_for
from hf_immunize.stages.workflow.state import Lock, State

_TAIL = 20
_POLL = 0.1


@dataclass
class Runner:
    """One call of ``hf-immunize run``.

    Args:
        stages: all of the run, in order.
        state: what was done before.
        launcher: how stages are started.
        jobs: how many at a time.
        chosen: the stages to run; all others have to be fresh where these need them.
        again: stages that are run although they are fresh.
    """

    stages: Mapping[str, Stage]
    state: State
    launcher: Launcher
    jobs: int
    chosen: Sequence[str]
    again: Sequence[str] = ()
    running: dict[str, tuple[subprocess.Popen[Any], float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._followers = {name: len(waiting_for(self.stages, name)) for name in self.stages}

    def expected(self) -> dict[str, str]:
        """The stages that will be run, with the reason; of those after them it is not known yet whether they change."""
        why: dict[str, str] = {}
        for name in self.chosen:
            stage = self.stages[name]
            reason = "asked for" if name in self.again else self.state.why_stale(stage, self.stages)
            waits = [need for need in stage.needs if need in why]
            if reason is None and waits:
                reason = f"after {', '.join(waits[:3])}{', …' if len(waits) > 3 else ''}"
            if reason is not None:
                why[name] = reason
        self._check_others(why)
        return why

    def _check_others(self, why: Mapping[str, str]) -> None:
        """Raise ConfigError where a chosen stage needs one that is neither chosen nor fresh."""
        for name in why:
            for need in (*self.stages[name].needs, *self.stages[name].after):
                if need in self.chosen:
                    continue
                if (reason := self.state.why_stale(self.stages[need], self.stages)) is not None:
                    raise ConfigError(
                        f"expected {need} to be done for the stage {name}, got: {reason}. Run it too: --stage {need} "
                        f"--stage {name}, or all without --stage."
                    )

    def run(self, lock: Lock, console: Console | None = None) -> None:
        """Run what is expected; progress goes to ``console``, standard output by default.

        Raises:
            StageError: a stage that failed, with the end of its log; stages beside it are ended, and go on next time.
        """
        why = self.expected()
        known = {name: seconds for name in self.stages
                 if (seconds := (self.state.record(self.stages[name]) or {}).get("seconds"))}
        waiting = list(self.chosen)
        page = ProgressPage(self.state.root, self.stages)
        with Display(len(self.chosen), known, console, page) as display, _interruptible(), page:
            display.plan({name: self.stages[name].verb for name in why})
            for name, reason in why.items():
                if not reason.startswith(("not run yet", "after ")):
                    display.say(f"        {name} runs again: {reason}")
            try:
                while waiting or self.running:
                    self._start_ready(waiting, display, lock)
                    self._collect(display)
                    display.tick()
            finally:
                for process, _ in self.running.values():
                    end(process)

    def _start_ready(self, waiting: list[str], display: Display, lock: Lock) -> None:
        """Start stages whose needs are met, up to ``jobs``; pass over those that are fresh.

        Side by side, those come first that most others wait for: the exam of the base before an immunization.
        """
        for name in sorted(waiting, key=lambda name: -self._followers[name]) if self.jobs > 1 else list(waiting):
            stage = self.stages[name]
            if any(need in waiting or need in self.running for need in (*stage.needs, *stage.after)):
                continue
            if name not in self.again and self.state.why_stale(stage, self.stages) is None:
                waiting.remove(name)
                display.fresh(name)
                continue
            if len(self.running) >= self.jobs:
                continue
            waiting.remove(name)
            aside = self.state.set_aside(stage) if name in self.again else None
            if aside := self.state.begin(stage, self.stages) or aside:
                display.say(f"        {name}: the earlier results are kept in {aside}")
            process = self.launcher.start(stage, self.state.options_file(stage), self.log(name), [lock.file.fileno()])
            self.running[name] = process, time.perf_counter()
            lock.tell(f"process {os.getpid()} with {', '.join(self.running)}")
            display.started(name, self.log(name))

    def _collect(self, display: Display) -> None:
        """Wait a moment, and take what has ended."""
        if self.running:
            time.sleep(_POLL)
        for name, (process, start) in list(self.running.items()):
            code = process.poll()
            if code is None:
                continue
            del self.running[name]
            seconds = time.perf_counter() - start
            if code:
                raise StageError(_failure(name, code, seconds, self.log(name)))
            self.state.finish(self.stages[name], self.stages, seconds)
            display.finished(name, seconds)

    def log(self, name: str) -> Path:
        """What the stage printed, of all its starts."""
        return self.state.root / "logs" / f"{name}.log"


def _failure(name: str, code: int, seconds: float, log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
    how = f"ended by signal {-code}" if code < 0 else f"left with exit code {code}"
    memory = " (the system ends processes so when memory runs out)" if code == -signal.SIGKILL else ""
    tail = "\n".join(line for line in lines[-_TAIL:] if line.strip())
    return (
        f"expected the stage {name} to end well, got one that {how}{memory} after {seconds:.0f} s. Repair the cause "
        "and "
        f"run again: what is done stays done. The end of {log}:\n{tail}"
    )


@contextmanager
def _interruptible() -> Iterator[None]:
    """A termination signal becomes an exit that ends the stages first, as Ctrl-C does."""

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, leave)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def choose_again(stages: Mapping[str, Stage], named: Sequence[str]) -> list[str]:
    """What ``--from`` runs again: these stages and all that need them."""
    return depending(stages, named)
