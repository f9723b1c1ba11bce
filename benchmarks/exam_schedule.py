"""How close the order in which processes take an exam's runs is to the best schedule: 1, 2 and 4 simulated devices.

    python benchmarks/exam_schedule.py
    python benchmarks/exam_schedule.py runs/digits-vit/base/traces/control runs/digits-vit/*/traces/subject
    OMP_NUM_THREADS=1 python benchmarks/exam_schedule.py --two-processes runs/digits-vit/base

Simulated devices take the jobs of an exam in the order of the queue that processes share, each attack going through its
own rounds (``hf_immunize.attacks.core.jobs`` and ``rounds``, the code that real exams run). The end is compared with
what no schedule can beat: all seconds by the number of devices, or the rounds of one attack one after the other.

With folders of traces: reads the seconds that the runs of a finished exam took (traces of one folder are one exam).
Without: the preset exams of a base, and of a model whose finals come in two rounds since the first might decide; each
search with the proposals of its preset and the finals of one trial. Seconds are drawn: those of a training step, times
a factor per job that the planner does not know (log-normal, ±30 %).

With ``--two-processes`` and a model of the demo: sits the demo's exam of it for real, by one process and then by two on
the same folder, and prints the ratio of their times and whether their traces tell the same. Needs an idle machine.
"""

from __future__ import annotations

import argparse
import heapq
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

from hf_immunize.attacks import ATTACKS, TRAINABILITY, Run, parse_settings
from hf_immunize.attacks.core.effort import Effort, Follow, Proposed
from hf_immunize.attacks.core.jobs import Job, Queue, Round, jobs_of
from hf_immunize.attacks.core.rounds import Course, compared_runs
from hf_immunize.exam import PROTOCOLS, Protocol
from hf_immunize.records import AttackTrace, Search
from hf_immunize.stages.following import adapting_attacks

TABLE = {**ATTACKS, **TRAINABILITY}
Exam = dict[str, list[Round]]
"""The rounds of every attack."""
STEP = 0.05
"""Seconds of a step of training a network: the size of the demo."""
DEVICES = (1, 2, 4)
WITHIN = 1.1
"""Of the best, wanted."""


def makespan(exam: Exam, seconds: dict[Job, float], devices: int) -> float:
    """When the last job ends if each device takes the most urgent one as soon as it is free."""
    queue, now = Queue({name: iter(rounds) for name, rounds in exam.items()}), 0.0
    running: list[tuple[float, int, Job]] = []
    taken: set[Job] = set()
    while queue.waiting:
        job = next((job for job in queue.waiting if job not in taken), None)
        if job is not None and len(running) < devices:
            taken.add(job)
            heapq.heappush(running, (now + seconds[job], len(taken), job))
        else:
            now, _, done = heapq.heappop(running)
            queue.finished(done)
    return now


def bound(exam: Exam, seconds: dict[Job, float], devices: int) -> float:
    """What no schedule beats: every job made by somebody, the rounds of an attack one after the other."""
    rounds = [[[seconds[job] for job in one.jobs] for one in found if one.jobs] for found in exam.values()]
    chains = [sum(max(sum(jobs) / devices, max(jobs)) for jobs in found) for found in rounds]
    return max(sum(seconds.values()) / devices, *chains)


def ratio(exam: Exam, seconds: dict[Job, float], devices: int) -> float:
    """The end of the schedule over what no schedule beats."""
    return makespan(exam, seconds, devices) / bound(exam, seconds, devices)


def planned_exam(protocol: Protocol, model: bool) -> Exam:
    """The rounds of a preset exam of a base, or of the model."""
    settings, found = parse_settings(protocol.settings, ATTACKS), {}
    adapting = adapting_attacks(protocol, ATTACKS, protocol.attacks, settings, protocol.trials)
    for name in protocol.attacks:
        asked = compared_runs(ATTACKS[name], protocol.seeds, settings.get(name), protocol.trials, protocol.tuning_seeds)
        searches = protocol.search is not None and name in adapting and asked[0].tuning
        course = Course(name, ATTACKS[name], asked, protocol.seeds, finished,
                        follow=proposing(protocol.search) if searches else None, decided=undecided if model else None)
        found[name] = list(course.rounds())
    return found


def finished(name: str, runs: Sequence[Run]) -> tuple[list[SimpleNamespace], int]:
    """Traces of which none is better than another: one trial goes on."""
    return [SimpleNamespace(trial=run.trial, seed=run.seed, curve=[]) for run in runs], 0


def undecided(name: str, traces: Sequence[object]) -> bool:
    """Every seed is run."""
    return False


def proposing(search: Search) -> Follow:
    """Batches of trials as a search proposes them."""

    def follow(name: str, traces: Sequence[object], effort: Effort) -> Effort | None:
        made = len(effort.proposed)
        batch = range(made + 1, 1 + min(search.further, made + search.batch))
        more = tuple(Proposed(f"proposed={number}", (), number, ()) for number in batch)
        return replace(effort, proposed=(*effort.proposed, *more)) if more else None

    return follow


def drawn_seconds(exam: Exam, draw: int) -> dict[Job, float]:
    """Seconds of every job, the same whoever takes it when."""
    found = {}
    for job in (job for rounds in exam.values() for one in rounds for job in one.jobs):
        source = random.Random(f"{draw} {job.name} {job.runs[0].trial} {job.runs[0].seed}")
        found[job] = STEP * job.cost * source.lognormvariate(0, 0.3)
    return found


def show_plans() -> None:
    """Two rows for every preset exam."""
    print(f"{'planned exam':16} {'jobs':>5} {'seconds':>9} {'draws':>5}   schedule / bound on 1, 2 and 4 devices: "
          f"median, worst (draws within {WITHIN:.2f})")
    for name, protocol in PROTOCOLS.items():
        for model in (False, True):
            exam = planned_exam(protocol, model)
            jobs = sum(len(one.jobs) for rounds in exam.values() for one in rounds)
            draws = [drawn_seconds(exam, draw) for draw in range(1000 if jobs < 1000 else 20)]
            total = statistics.fmean(sum(seconds.values()) for seconds in draws)
            found = [[ratio(exam, seconds, devices) for seconds in draws] for devices in DEVICES]
            told = "   ".join(f"{statistics.median(ratios):.3f} {max(ratios):.3f} "
                              f"({sum(one <= WITHIN for one in ratios) / len(ratios):.1%})" for ratios in found)
            side = f"{name}, {'model' if model else 'base'}"
            print(f"{side:16} {jobs:5} {total:9.1f} {len(draws):5}   {told}", flush=True)


def made_exam(traces: Sequence[AttackTrace]) -> tuple[Exam, dict[Job, float]]:
    """The rounds of a finished exam, and the seconds of its jobs."""
    exam, seconds = {}, {}
    order = sorted({trace.seed for trace in traces})
    for name in dict.fromkeys(trace.attack for trace in traces):
        mine = [trace for trace in traces if trace.attack == name]
        most = max(int(trace.config.get("proposed", 0)) for trace in mine)
        batch = next((one.search.batch for one in PROTOCOLS.values() if one.search and one.search.further >= most), 1)
        rounds: dict[tuple[int, ...], list[AttackTrace]] = defaultdict(list)
        for trace in mine:
            rounds[place_of(trace, batch, order)].append(trace)
        finals = max(place[0] for place in rounds)
        exam[name] = []
        for place, found in sorted(rounds.items()):
            runs = {Run(Steps(trace.budget), trace.trial, trace.seed, widened=int(trace.config.get("widened", 0))):
                    trace.seconds for trace in found}
            jobs = jobs_of(name, TABLE[name], list(runs), finals - place[0])
            seconds |= {job: sum(runs[run] for run in job.runs) for job in jobs}
            exam[name].append(Round(jobs))
    return exam, seconds


@dataclass(frozen=True)
class Steps:
    """All that a queue wants to know of an attack's settings."""

    steps: int


def place_of(trace: AttackTrace, batch: int, seeds: Sequence[int]) -> tuple[int, ...]:
    """Where a run's round comes in the order of its attack's."""
    tuning = trace.config.get("tuning_seeds")
    if tuning and trace.seed not in tuning:
        late = trace.role == "subject" and trace.seed not in seeds[: len(seeds) // 2 + 1]
        return (2 if late else 1,)
    return 0, trace.budget, int(trace.config.get("widened", 0)), -(-int(trace.config.get("proposed", 0)) // batch)


def show_traces(folders: Sequence[Path]) -> None:
    """A row for every finished exam."""
    print(f"{'exam':40} {'runs':>5} {'seconds':>8}   schedule / bound on 1, 2 and 4 devices")
    for folder in folders:
        traces = [AttackTrace.read(path) for path in sorted(folder.glob("*.json"))]
        exam, seconds = made_exam([trace for trace in traces if trace.attack in TABLE])
        told = "  ".join(f"{ratio(exam, seconds, devices):.3f}" for devices in DEVICES)
        print(f"{str(folder)[-40:]:40} {len(traces):5} {sum(seconds.values()):8.1f}   {told}")


def sit_for_real(model: Path, processes: int, into: Path) -> tuple[float, dict[str, list]]:
    """Seconds that so many processes take for the demo's exam of a model, and its curves."""
    recipe = Path(__file__).parent.parent / "recipes" / "digits-vit"
    words = [sys.executable, "-m", "hf_immunize.cli", "attack", "--config", str(recipe / "task.yaml"), "--config",
             str(recipe / "attack.yaml"), "--model_path", str(model), "--device", "cpu", "--output_path", str(into)]
    started = time.perf_counter()
    running = [subprocess.Popen(words, stdout=subprocess.DEVNULL) for _ in range(processes)]
    if any([process.wait() for process in running]):
        sys.exit("an attacking process failed")
    seconds = time.perf_counter() - started
    traces = map(AttackTrace.read, into.glob("traces/*/*.json"))
    return seconds, {f"{trace.role}/{trace.file_name}": trace.curve for trace in traces}


def main() -> None:
    """Print a row for every exam."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="Folders of traces; the presets' plans by default.")
    parser.add_argument("--two-processes", type=Path, metavar="MODEL", help="Sit the demo's exam of MODEL for real.")
    arguments = parser.parse_args()
    if arguments.two_processes:
        with tempfile.TemporaryDirectory() as folder:
            one, alone = sit_for_real(arguments.two_processes, 1, Path(folder) / "one")
            two, shared = sit_for_real(arguments.two_processes, 2, Path(folder) / "two")
        same = "the same traces" if alone == shared else "OTHER TRACES"
        print(f"one process {one:.0f} s, two {two:.0f} s: {two / one:.2f} of the time (wanted: at most 0.60), {same}")
    elif arguments.folders:
        show_traces(arguments.folders)
    else:
        show_plans()


if __name__ == "__main__":
    main()
