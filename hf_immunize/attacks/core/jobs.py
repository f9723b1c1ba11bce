"""In which order an exam's jobs are taken: each attack goes through its own rounds, and none waits for another's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from hf_immunize.attacks.core.shape import Attack, Run
from hf_immunize.attacks.core.sharing import Share


@dataclass(frozen=True, eq=False)
class Job:
    """What one process makes at a time: one run, or all runs of an attack whose runs are one tensor program."""

    name: str
    attack: Attack
    runs: tuple[Run, ...]
    later: int = 0
    """Rounds of the attack, as far as they are known, that cannot begin before this job is done."""

    @property
    def cost(self) -> float:
        """What it will take, in steps."""
        return planned_cost(self.attack, _steps(self.runs))

    @cached_property
    def urgency(self) -> float:
        """The least that has to be made one after the other from here on: the job, and one run of every later round.

        By which jobs are taken, so that no process is left at the end with one that others had to wait for.
        """
        return self.cost + self.later * max(planned_cost(self.attack, [steps]) for steps in _steps(self.runs))


@dataclass(frozen=True)
class Round:
    """Jobs of one attack that depend on nothing but the attack's rounds before."""

    jobs: Sequence[Job]
    missing: int = 0
    """Runs of earlier rounds, of other parts of the exam, that have to be there before it is known what comes."""


def planned_cost(attack: Attack, steps: Sequence[int]) -> float:
    """What a job will take, in steps of training a network: its runs one by one, or as columns of one program.

    Rough, and enough to begin with the longest: a step of all columns of a linear probe takes about a fiftieth.
    """
    return max(steps) / 50 if attack.batched else float(sum(steps))


def jobs_of(name: str, attack: Attack, runs: Sequence[Run], later: int = 0) -> list[Job]:
    """The jobs that a round's runs make up."""
    together = [tuple(run for run in runs if run.widened == number)  # their company, whenever they are made
                for number in sorted({run.widened for run in runs})]
    parts = together if attack.batched else [(run,) for run in runs]
    return [Job(name, attack, part, later) for part in parts]


def _steps(runs: Sequence[Run]) -> list[int]:
    return [getattr(run.config, "steps", 1) for run in runs]


class Queue:
    """The jobs of an exam that can be made now, most urgent first, while each attack goes through its rounds.

    Which jobs there are, and which of them belong to a part of the exam, follows from finished runs alone; only their
    order depends on who was how fast.

    Args:
        rounds: by attack; asked for the next round once all jobs of the one before are finished.
        share: its part of the jobs is taken, that of every first round over all attacks, longest first, and of each
            later one beginning with another part for every attack.
    """

    def __init__(self, rounds: Mapping[str, Iterator[Round]], share: Share | None = None):
        self.waiting: list[Job] = []
        self.blocked: dict[str, int] = {}
        """By attack how many runs of other parts it waits for."""
        self._share, self._rounds = share or Share(), rounds
        self._places = {name: place for place, name in enumerate(rounds)}
        first = [job for mine in rounds.values() for job in next(mine).jobs]
        held = self._held(first, 0)
        for name in rounds:
            if not self._begin([job for job in held if job.name == name]):
                self._advance(name)

    def finished(self, job: Job) -> None:
        """Take a job out; after the last one of its round the attack's next round begins."""
        self.waiting.remove(job)
        if not any(other.name == job.name for other in self.waiting):
            self._advance(job.name)

    def retry(self) -> bool:
        """Look once more for the runs that attacks wait for; whether there is anything to make now."""
        for name in list(self.blocked):
            del self.blocked[name]
            self._advance(name)
        return bool(self.waiting)

    def _advance(self, name: str) -> None:
        for following in self._rounds[name]:
            if following.missing:
                self.blocked[name] = following.missing
                return
            if self._begin(self._held(following.jobs, self._places[name])):
                return

    def _begin(self, jobs: Sequence[Job]) -> bool:
        """Sort jobs in among the others; whether there are any."""
        self.waiting = sorted([*self.waiting, *jobs], key=lambda job: job.urgency, reverse=True)
        return bool(jobs)

    def _held(self, jobs: Sequence[Job], offset: int) -> list[Job]:
        """The jobs of this part."""
        ordered = sorted(jobs, key=lambda job: job.cost, reverse=True)
        return [job for place, job in enumerate(ordered) if self._share.holds(place + offset)]
