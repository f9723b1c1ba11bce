"""The rounds of one attack: trials compared, effort that follows, finals. Each is a function of finished runs alone."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hf_immunize.attacks.core.effort import Effort, Follow
from hf_immunize.attacks.core.finalists import finalists
from hf_immunize.attacks.core.jobs import Round, jobs_of
from hf_immunize.attacks.core.plan import is_searchable, plan_runs
from hf_immunize.attacks.core.shape import Attack, Run
from hf_immunize.records import AttackTrace

Found = Callable[[str, Sequence[Run]], tuple[Sequence[AttackTrace], int]]
"""Given an attack and runs of it: their traces, whoever made them, and how many are not there yet."""
Decided = Callable[[str, Sequence[AttackTrace]], bool]
"""Given an attack and its runs on more than half of all seeds: whether the other seeds can change nothing."""


@dataclass(frozen=True)
class Course:
    """The way of one attack through an exam.

    Args:
        asked: the runs on which its trials are compared, as ``compared_runs`` gives them.
        found: where the traces of finished runs come from.
        effort, follow, decided: as in ``run_suite``.
    """

    name: str
    attack: Attack
    asked: Sequence[Run]
    seeds: Sequence[int]
    found: Found
    effort: Effort = Effort()
    follow: Follow | None = None
    decided: Decided | None = None

    def rounds(self) -> Iterator[Round]:
        """One round after the other, each when the runs of those before are there."""
        effort, compared = self.effort, self.effort.applied(self.asked)
        later = 0 if not compared or not compared[0].tuning else 1 if self.decided is None else 2
        yield Round(jobs_of(self.name, self.attack, compared, later))
        while self.follow is not None:
            traces = yield from self._made(compared)
            further = self.follow(self.name, traces, effort)
            if further is None:
                break
            known, compared, effort = compared, further.applied(self.asked), further
            more = [run for run in compared if run not in known]
            yield Round(jobs_of(self.name, self.attack, more, later))
        if compared and compared[0].tuning:
            yield from self._finals(compared)

    def _finals(self, compared: Sequence[Run]) -> Iterator[Round]:
        """The runs on the seeds that trials were not compared on; where these decide, those of the majority alone."""
        chosen = finalists((yield from self._made(compared)))
        runs = {run.trial: run for run in compared}
        finals = [replace(runs[trial], seed=seed, bars=())  # finals are run to the end
                  for trial in chosen for seed in self.seeds if seed not in runs[trial].tuning]
        early = set(sorted(self.seeds)[: len(self.seeds) // 2 + 1] if self.decided else self.seeds)
        soon, rest = ([run for run in finals if (run.seed in early) is wanted] for wanted in (True, False))
        yield Round(jobs_of(self.name, self.attack, soon, 1 if rest else 0))
        if self.decided and rest and not self.decided(self.name, (yield from self._made([*compared, *soon]))):
            yield Round(jobs_of(self.name, self.attack, rest))

    def _made(self, runs: Sequence[Run]) -> Generator[Round, None, Sequence[AttackTrace]]:
        """The traces of these runs, as soon as all of them are there."""
        while True:
            traces, missing = self.found(self.name, runs)
            if not missing:
                return traces
            yield Round([], missing)


def compared_runs(
    attack: Attack, seeds: Sequence[int], chosen: Mapping[str, Sequence[Any]] | None, trials: int | None,
    tuning_seeds: int | None,
) -> list[Run]:
    """The runs on which an attack's trials are compared: on the tuning seeds, or on all of them."""
    runs = plan_runs(attack, seeds, chosen, trials)
    if not is_staged(attack, runs, seeds, tuning_seeds):
        return runs
    tuning = tuple(seeds[:tuning_seeds])
    return [replace(run, tuning=tuning) for run in runs if run.seed in tuning]


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
