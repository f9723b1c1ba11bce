"""Run attacks and keep one trace file per run; a run that is already on disk is not made again.

Several processes may work on one folder: each takes the next run that nobody is at (``Claims``).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_immunize.attacks.core.effort import Effort, Follow
from hf_immunize.attacks.core.finalists import finalists
from hf_immunize.attacks.core.plan import find_attack, is_searchable, plan_runs
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
    decided: Callable[[str, Sequence[AttackTrace]], bool] | None = None,
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
    sitting = _Sitting(context, table, Path(folder) / "traces" / context.role, overwrite, share, progress)
    asked = {name: _compared_runs(find_attack(name, table), seeds, (settings or {}).get(name), trials, tuning_seeds)
             for name in names}
    reached = {name: (efforts or {}).get(name, Effort()) for name in names}
    first = {name: reached[name].applied(runs) for name, runs in asked.items()}
    sitting.sit(first)
    waiting = _follow_on(sitting, asked, first, reached, follow) if follow else 0
    second = {}
    for name in (name for name in names if first[name] and first[name][0].tuning):
        traces, missing = sitting.found(name, first[name])
        waiting += missing
        chosen = [] if missing else finalists(traces)
        runs = {run.trial: run for run in first[name]}
        second[name] = [
            dataclasses.replace(runs[trial], seed=seed, bars=())  # finals are run to the end
            for trial in chosen for seed in seeds if seed not in runs[trial].tuning
        ]
    _run_finals(sitting, first, second, seeds, decided)
    sitting.claims.clear()
    diverged = sum(trace.outcome == "diverged" for trace in sitting.all)
    return SuiteSummary(sitting.made, len(sitting.all) - sitting.made, diverged, waiting)


def _run_finals(
    sitting: _Sitting, first: Mapping[str, Sequence[Run]], second: Mapping[str, Sequence[Run]], seeds: Sequence[int],
    decided: Callable[[str, Sequence[AttackTrace]], bool] | None,
) -> None:
    """Make the runs on the seeds that trials were not compared on; where these decide, those of the majority alone."""
    early = set(sorted(seeds)[: len(seeds) // 2 + 1] if decided else seeds)
    sitting.sit({name: [run for run in runs if run.seed in early] for name, runs in second.items()})
    late = {}
    for name, runs in second.items():
        made = [*first[name], *(run for run in runs if run.seed in early)]
        traces, missing = sitting.found(name, made)
        if len(early) < len(seeds) and decided and not missing and decided(name, traces):
            continue
        late[name] = [run for run in runs if run.seed not in early]
    sitting.sit(late)


def _compared_runs(
    attack: Attack, seeds: Sequence[int], chosen: Mapping[str, Sequence[Any]] | None, trials: int | None,
    tuning_seeds: int | None,
) -> list[Run]:
    """The runs on which an attack's trials are compared: on the tuning seeds, or on all of them."""
    runs = plan_runs(attack, seeds, chosen, trials)
    if not is_staged(attack, runs, seeds, tuning_seeds):
        return runs
    tuning = tuple(seeds[:tuning_seeds])
    return [dataclasses.replace(run, tuning=tuning) for run in runs if run.seed in tuning]


def _follow_on(
    sitting: _Sitting, asked: Mapping[str, Sequence[Run]], first: dict[str, list[Run]], reached: dict[str, Effort],
    follow: Follow,
) -> int:
    """Make what the runs so far call for, round by round, until nothing is; how many runs of others that waits for.

    ``first`` and ``reached`` are brought up to date. Every round is a function of finished traces alone, so that any
    number of processes goes the same way.
    """
    waiting, going = 0, list(asked)
    while going:
        more: dict[str, list[Run]] = {}
        for name in list(going):
            traces, missing = sitting.found(name, first[name])
            further = None if missing else follow(name, traces, reached[name])
            waiting += missing
            if further is None:
                going.remove(name)
                continue
            known, reached[name] = first[name], further
            first[name] = further.applied(asked[name])
            more[name] = [run for run in first[name] if run not in known]
        sitting.sit(more)
    return waiting


def is_staged(attack: Attack, runs: Sequence[Run], seeds: Sequence[int], tuning_seeds: int | None) -> bool:
    """Whether an attack's trials are compared on some of the seeds only."""
    return (
        tuning_seeds is not None
        and is_searchable(attack)
        and 0 < tuning_seeds < len(seeds)
        and len({run.trial for run in runs}) > 1
    )


def count_runs(attack: Attack, runs: Sequence[Run], seeds: Sequence[int], tuning_seeds: int | None) -> int:
    """How many of the planned runs a suite makes at least: a second finalist adds to them."""
    if not is_staged(attack, runs, seeds, tuning_seeds) or tuning_seeds is None:
        return len(runs)
    return len({run.trial for run in runs}) * tuning_seeds + len(seeds) - tuning_seeds


def planned_cost(attack: Attack, steps: Sequence[int]) -> float:
    """What a job will take, in steps of training a network: its runs one by one, or as columns of one program.

    Rough, and enough to begin with the longest: a step of all columns of a linear probe takes about a fiftieth.
    """
    return max(steps) / 50 if attack.batched else float(sum(steps))


@dataclasses.dataclass(frozen=True)
class _Job:
    """What one process makes at a time: one run, or all runs of an attack whose runs are one tensor program."""

    name: str
    attack: Attack
    runs: tuple[Run, ...]

    @property
    def cost(self) -> float:
        """By which the longest come first, so that no process is left with one at the end."""
        return planned_cost(self.attack, [getattr(run.config, "steps", 1) for run in self.runs])


@dataclasses.dataclass
class _Sitting:
    """Makes runs whose trace is missing and keeps the others."""

    context: Context
    table: Mapping[str, Attack]
    target: Path
    overwrite: bool
    share: Share
    progress: Callable[[AttackTrace, bool], None] | None
    all: list[AttackTrace] = dataclasses.field(default_factory=list)
    made: int = 0

    def __post_init__(self) -> None:
        self.claims = Claims(self.target.parents[1] / ".running" / self.context.role)
        self._provenance = Provenance.here(self.context.device)

    def sit(self, planned: Mapping[str, Sequence[Run]]) -> None:
        """Check every trace on disk first, then make what is missing, each as soon as nobody else is at it."""
        pending = {self._blank(job.name, job.runs[0]).file_name: job for job in self._jobs(planned)}
        for name, runs in planned.items():
            for run in runs:
                self._stored(name, run)
        while pending:
            left = len(pending)
            for key, job in list(pending.items()):
                with self.claims.take(key) as mine:
                    if mine:
                        self._make(job)
                        del pending[key]
            if len(pending) == left:
                time.sleep(_PAUSE)

    def _jobs(self, planned: Mapping[str, Sequence[Run]]) -> list[_Job]:
        """The jobs of this part, longest first."""
        jobs = []
        for name, runs in planned.items():
            attack = self.table[name]
            rounds = [tuple(run for run in runs if run.widened == number)  # their company, whenever they are made
                      for number in sorted({run.widened for run in runs})]
            parts = rounds if attack.batched else [(run,) for run in runs]
            jobs += [_Job(name, attack, part) for part in parts]
        ordered = sorted((job for job in jobs if job.runs), key=lambda job: job.cost, reverse=True)
        return [job for place, job in enumerate(ordered) if self.share.holds(place)]

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

    def _make(self, job: _Job) -> None:
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
