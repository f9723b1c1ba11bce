"""What a run shows while it goes: a line for each stage at work and a bar over all; in a file plain lines."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from hf_immunize.stages.workflow.live import ProgressPage

_BARS = re.compile(r"\d+(\.\d+)?\s?(it|s|row|run|step)s?/(it|s|row|run|step)|\?(it|row|run|step)/s")


class Display:
    """Progress over stages.

    Args:
        total: stages of the run.
        known: seconds that stages took the last time, by name.
        console: where to.
        page: told the same.
    """

    def __init__(self, total: int, known: Mapping[str, float], console: Console | None = None,
                 page: ProgressPage | None = None):
        self._page = page
        self._total, self._known, self._done = total, dict(known), 0
        self._console = console or Console(highlight=False, markup=False, soft_wrap=True)
        self._bars: Progress | None = None
        self._lines: dict[str, Any] = {}
        self._logs: dict[str, Path] = {}
        self._took: dict[str, float] = {}
        self._waiting: dict[str, str] = {}

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(20),
                       TimeElapsedColumn(), TextColumn("{task.fields[told]}", markup=False))
            self._bars = Progress(*columns, console=self._console, transient=True)
            self._bars.start()
            self._all = self._bars.add_task("all stages", total=self._total, told="")
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bars is not None:
            self._bars.stop()

    def say(self, line: str) -> None:
        """One line that stays."""
        self._console.print(line)

    def plan(self, waiting: Mapping[str, str]) -> None:
        """Stages that are still to be run, with their verbs: for the time that is left."""
        self._waiting = dict(waiting)

    def started(self, name: str, log: Path) -> None:
        """A stage is at work."""
        self._logs[name] = log
        if self._page is not None:
            self._page.tell(name, f"at work since {time.strftime('%H:%M:%S')}")
        if self._bars is None:
            self.say(f"        {name} …")
        else:
            known = self._known.get(name)
            self._lines[name] = self._bars.add_task(name, total=known, told="")

    def tick(self) -> None:
        """Look at the logs of the stages at work."""
        if self._bars is None:
            return
        for name, line in self._lines.items():
            task = next(task for task in self._bars.tasks if task.id == line)
            known = self._known.get(name)
            completed = min(task.elapsed or 0.0, 0.99 * known) if known else 0.0
            self._bars.update(line, completed=completed, told=last_line(self._logs[name])[:80])
        self._bars.update(self._all, completed=self._done, told=self._left())

    def _left(self) -> str:
        """The time that is left, where something is known about the stages that wait or are at work."""
        verbs: dict[str, list[float]] = {}
        for name, seconds in self._took.items():
            verbs.setdefault(self._waiting.get(name, ""), []).append(seconds)
        left = 0.0
        for name, verb in self._waiting.items():
            if name in self._took:
                continue
            guesses = [self._known[name]] if name in self._known else verbs.get(verb, [])
            if not guesses:
                return f"{self._done} of {self._total}"
            left += sum(guesses) / len(guesses)
        return f"{self._done} of {self._total}, about {time.strftime('%H:%M:%S', time.gmtime(left))} of work left"

    def finished(self, name: str, seconds: float) -> None:
        """A stage is whole."""
        self._done += 1
        self._took[name] = seconds
        if self._bars is not None:
            self._bars.remove_task(self._lines.pop(name))
        told = f"{last_line(self._logs[name])} ({seconds:.0f} s)"
        self.say(f"[{self._done:2d}/{self._total}] {name}: {told}")
        if self._page is not None:
            self._page.tell(name, told)

    def fresh(self, name: str) -> None:
        """A stage whose results are there."""
        self._done += 1
        self.say(f"[{self._done:2d}/{self._total}] {name}: done before, unchanged")
        if self._page is not None:
            self._page.tell(name, "done before, unchanged")


def last_line(log: Path) -> str:
    """The last thing a stage printed, without the progress bars that share its line."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")[-20_000:]
    except OSError:
        return ""
    lines = text.replace("\r", "\n").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip() and not _BARS.search(line)), "")
