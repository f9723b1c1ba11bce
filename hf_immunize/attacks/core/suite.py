"""Run attacks and keep one trace file per run; a run that is already on disk is not made again.

Several processes may work on one folder: each takes the most urgent run (``Queue``) that nobody is at (``Claims``).
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_immunize.attacks.core.effort import Effort, Follow
from hf_immunize.attacks.core.jobs import Job, Queue
from hf_immunize.attacks.core.plan import find_attack
from hf_immunize.attacks.core.rounds import Course, Decided, compared_runs
from hf_immunize.attacks.core.shape import Attack, Context, Result, Run
from hf_immunize.attacks.core.sharing import Claims, Share
from hf_immunize.attacks.core.stored import check_same, trace_of
from hf_immunize.errors import ConfigError
from hf_immunize.records import AttackTrace, Provenance, atomic_write

_NOT_RUN = Result([], 1, 0.0, "diverged", "not run")
_PAUSE = 0.2
"""Seconds between two looks at runs that others are at."""


@dataclasses.dataclass(frozen=True)
class SuiteSummary:
    """How many runs were made now, how many were there already or came from others, and how many of all diverged.

    ``waiting``: runs of other parts that have to be there before finalists can be chosen.
    """

    made: int
    kept: int
    diverged: int
    waiting: int = 0


def run_suite(
    context: Context,
    table: Mapping[str, Attack],
    names: Sequence[str],
    seeds: Sequence[int],
    folder: str | Path,
    settings: Mapping[str, Mapping[str, Sequence[Any]]] | None = None,
    *,
    trials: int | None = None,
    tuning_seeds: int | None = None,
    overwrite: bool = False,
    share: Share | None = None,
    progress: Callable[[AttackTrace, bool], None] | None = None,
    efforts: Mapping[str, Effort] | None = None,
    follow: Follow | None = None,
    decided: Decided | None = None,
) -> SuiteSummary:
    """Run every (attack, trial, seed) that has no valid trace yet and write its trace to ``folder/traces/<role>/``.

    Args:
        trials: as in ``plan_trials``.
        tuning_seeds: compare the trials of attacks that have a ``search`` on this many of the seeds, and run only the
            ``finalists`` (one or two) on the others. None: every trial on every seed.
        share: what part of the exam this process makes; all of it by default. Traces do not depend on it.
        progress: called once per run with its trace and whether it was made now.
        efforts: by attack what is run instead of what the settings ask for.
        follow: told the runs on which an attack's trials are compared, it says which effort to go on with.
        decided: told an attack's runs on the first seeds, more than half of all, it says whether the others can be left
            out because they change nothing.

    Raises:
        ConfigError: ``overwrite`` with several processes, which would replace each other's.
        RunMismatchError: a trace file of the same name tells of other weights, data or settings, and ``overwrite`` is
            off. Nothing is run in that case.
        RecordError: a trace file that cannot be read, and ``overwrite`` is off.
    """
    share = share or Share()
    if overwrite and (share.size > 1 or share.parts > 1):
        raise ConfigError("expected one process and no shard with overwrite, got several: remove old traces instead.")
    sitting = _Sitting(context, table, Path(folder) / "traces" / context.role, overwrite, progress)
    courses = {}
    for name in names:
        asked = compared_runs(find_attack(name, table), seeds, (settings or {}).get(name), trials, tuning_seeds)
        effort = (efforts or {}).get(name, Effort())
        course = Course(name, find_attack(name, table), asked, seeds, sitting.found, effort, follow, decided)
        courses[name] = course.rounds()
    queue = Queue(courses, share)
    sitting.sit(queue)
    sitting.claims.clear()
    return sitting.summary(blocked=sum(queue.blocked.values()))


@dataclasses.dataclass
class _Sitting:
    """Makes runs whose trace is missing and keeps the others."""

    context: Context
    table: Mapping[str, Attack]
    target: Path
    overwrite: bool
    progress: Callable[[AttackTrace, bool], None] | None
    all: list[AttackTrace] = dataclasses.field(default_factory=list)
    made: int = 0
    _checked: dict[Job, list[str]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.claims = Claims(self.target.parents[1] / ".running" / self.context.role)
        self._provenance = Provenance.here(self.context.device)

    def summary(self, blocked: int) -> SuiteSummary:
        """What was made and what was there; ``blocked`` runs wait for others."""
        diverged = sum(trace.outcome == "diverged" for trace in self.all)
        return SuiteSummary(self.made, len(self.all) - self.made, diverged, blocked)

    def sit(self, queue: Queue) -> None:
        """Make what is missing, the most urgent first of what nobody else is at."""
        while queue.waiting or queue.retry():
            self._keep(queue)
            if queue.waiting and not self._make_one(queue):
                time.sleep(_PAUSE)

    def _keep(self, queue: Queue) -> None:
        """Let attacks go on as far as the traces on disk lead, each checked before anything else is made."""
        there = set[str]()
        if self.target.exists() and not self.overwrite:
            there.update(os.listdir(self.target))
        while done := [job for job in queue.waiting if there.issuperset(self._files(job))]:
            for job in done:
                self._make(job)
                queue.finished(job)

    def _make_one(self, queue: Queue) -> bool:
        """Make the first job that nobody else is at; False where there is none."""
        for job in queue.waiting:
            with self.claims.take(self._files(job)[0]) as mine:
                if mine:
                    self._make(job)
            if mine:
                queue.finished(job)
                return True
        return False

    def _files(self, job: Job) -> list[str]:
        """Names of the traces of a job; the first time each one that is on disk is checked."""
        if job not in self._checked:
            for run in job.runs:
                self._stored(job.name, run)
            self._checked[job] = [self._blank(job.name, run).file_name for run in job.runs]
        return self._checked[job]

    def found(self, name: str, runs: Sequence[Run]) -> tuple[list[AttackTrace], int]:
        """The traces of these runs, whoever made them, and how many are not there yet."""
        traces = [self._stored(name, run, again=False) for run in runs]
        there = [trace for trace in traces if trace is not None]
        return there, len(traces) - len(there)

    def _blank(self, name: str, run: Run) -> AttackTrace:
        """What a run would write, with an empty result: everything that must agree with a file already there."""
        return trace_of(self.context, name, self.table[name], run, _NOT_RUN, self._provenance)

    def _stored(self, name: str, run: Run, *, again: bool | None = None) -> AttackTrace | None:
        """The trace on disk, if it is there and not to be made again."""
        blank = self._blank(name, run)
        path = self.target / blank.file_name
        if (self.overwrite if again is None else again) or not path.exists():
            return None
        return check_same(AttackTrace.read(path), blank, path)

    def _make(self, job: Job) -> None:
        """Keep what is there by now, make the rest, and write each trace as soon as there is one."""
        missing = []
        for run in job.runs:
            if (trace := self._stored(job.name, run)) is None:
                missing.append(run)
            else:
                self._note(trace, False)
        if not missing:
            return
        for run, result in job.attack.run(self.context, job.runs):
            if run not in missing:
                continue
            trace = trace_of(self.context, job.name, job.attack, run, result, self._provenance)
            if result.picture is not None:  # first, since the trace is what says that the run is whole
                atomic_write(self.target.parents[1] / picture_name(trace), result.picture)
            trace.write(self.target / trace.file_name)
            self._note(trace, True)

    def _note(self, trace: AttackTrace, made: bool) -> None:
        self.all.append(trace)
        self.made += made
        if self.progress:
            self.progress(trace, made)


def picture_name(trace: AttackTrace) -> str:
    """Where the picture of a run lies, relative to the model's folder."""
    return f"samples/{trace.role}/{trace.file_name.removesuffix('.json')}.png"
