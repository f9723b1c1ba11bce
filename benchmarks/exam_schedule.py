"""How close the order in which processes take an exam's runs is to the best schedule: 1, 2 and 4 simulated devices.

    python benchmarks/exam_schedule.py
    python benchmarks/exam_schedule.py runs/digits-vit/base/traces/control runs/digits-vit/*/traces/subject
    OMP_NUM_THREADS=1 python benchmarks/exam_schedule.py --two-processes runs/digits-vit/base

With folders of traces: reads the seconds that the runs of a finished exam took (traces of one folder are one exam),
lets simulated devices take them as ``run_suite`` hands them out (longest planned first; those of a batched attack as
one job; finalists after all first runs) and compares the end with what no schedule can beat in
either of the two rounds. Without: the runs of the preset exams, whose seconds are drawn: those of a training
step, times a factor per job that the planner does not know (log-normal, ±30 %).

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
from pathlib import Path

from hf_immunize.attacks import ATTACKS, TRAINABILITY, parse_settings, plan_runs
from hf_immunize.attacks.core.suite import is_staged, planned_cost
from hf_immunize.exam import PROTOCOLS, Protocol
from hf_immunize.records import AttackTrace

TABLE = {**ATTACKS, **TRAINABILITY}
Job = tuple[float, float]
"""What is known of a job before it is made, and the seconds it takes."""


def jobs_of(traces: Sequence[AttackTrace]) -> list[Job]:
    """Jobs, longest planned first."""
    together: dict[str, list[AttackTrace]] = defaultdict(list)
    for trace in traces:
        together[trace.attack if TABLE[trace.attack].batched else trace.file_name].append(trace)
    jobs = [
        (
            planned_cost(TABLE[runs[0].attack], [int(run.config.get("steps", 1)) for run in runs]),
            sum(run.seconds for run in runs),
        )
        for runs in together.values()
    ]
    return sorted(jobs, key=lambda job: job[0], reverse=True)


def rounds(traces: Sequence[AttackTrace]) -> list[list[Job]]:
    """The jobs of the first round, and of the finals."""
    final = [trace for trace in traces if (seeds := trace.config.get("tuning_seeds")) and trace.seed not in seeds]
    return [jobs_of([trace for trace in traces if trace not in final]), jobs_of(final)]


def makespan(jobs: Sequence[Job], devices: int) -> float:
    """When the last job ends if each device takes the next one as soon as it is free."""
    free = [0.0] * devices
    for _, seconds in jobs:
        heapq.heapreplace(free, free[0] + seconds)
    return max(free)


def bound(jobs: Sequence[Job], devices: int) -> float:
    """What no schedule beats."""
    seconds = [seconds for _, seconds in jobs]
    return max(sum(seconds) / devices, max(seconds, default=0.0))


def ratio(parts: Sequence[Sequence[Job]], devices: int) -> float:
    """The end of the schedule over what no schedule beats."""
    best = sum(bound(jobs, devices) for jobs in parts)
    return sum(makespan(jobs, devices) for jobs in parts) / best if best else 1.0


def known(parts: Sequence[Sequence[Job]]) -> list[list[Job]]:
    """The same jobs in the order of who knows their seconds beforehand."""
    return [sorted(jobs, key=lambda job: job[1], reverse=True) for jobs in parts]


STEP = 0.05
"""Seconds of a step of training a network: the size of the demo."""


def planned_rounds(protocol: Protocol, drawn: random.Random) -> list[list[Job]]:
    """The jobs of a preset exam of one model, with drawn seconds; of each search the finals of one trial."""
    settings, found = parse_settings(protocol.settings, ATTACKS), ([], [])
    for name in protocol.attacks:
        attack = ATTACKS[name]
        runs = plan_runs(attack, protocol.seeds, settings.get(name), protocol.trials)
        staged = is_staged(attack, runs, protocol.seeds, protocol.tuning_seeds)
        tuning = protocol.seeds[: protocol.tuning_seeds] if staged else protocol.seeds
        first = [run for run in runs if run.seed in tuning]
        last = [run for run in runs if run.seed not in tuning and run.trial == runs[0].trial]
        for place, part in enumerate((first, last)):
            for jobs in [part] if attack.batched else [[run] for run in part]:
                if jobs:
                    cost = planned_cost(attack, [getattr(run.config, "steps", 1) for run in jobs])
                    found[place].append((cost, STEP * cost * drawn.lognormvariate(0, 0.3)))
    return [sorted(part, key=lambda job: job[0], reverse=True) for part in found]


def show_plans() -> None:
    """A row for every preset exam."""
    print(f"{'planned exam':20} {'jobs':>5} {'seconds':>9}   schedule / bound on 1, 2, 4 devices, median (worst)")
    for name, protocol in PROTOCOLS.items():
        draws = [planned_rounds(protocol, random.Random(seed)) for seed in range(20)]
        found = [sorted(ratio(parts, devices) for parts in draws) for devices in (1, 2, 4)]
        told = "  ".join(f"{statistics.median(ratios):.3f} ({ratios[-1]:.3f})" for ratios in found)
        total = sum(seconds for part in draws[0] for _, seconds in part)
        count = sum(map(len, draws[0]))
        print(f"{name:20} {count:5} {total:9.1f}   {told}")
        foreseen = sorted(ratio(known(parts), 4) for parts in draws)
        print(f"{'':36}   4 devices, seconds known: {statistics.median(foreseen):.3f} ({foreseen[-1]:.3f})")


def show_traces(folders: Sequence[Path]) -> None:
    """A row for every finished exam."""
    print(f"{'exam':40} {'runs':>5} {'seconds':>8}   schedule / bound on 1, 2 and 4 devices")
    for folder in folders:
        traces = [AttackTrace.read(path) for path in sorted(folder.glob("*.json"))]
        parts = rounds([trace for trace in traces if trace.attack in TABLE])
        total = sum(trace.seconds for trace in traces)
        told = "  ".join(f"{ratio(parts, devices):.3f}" for devices in (1, 2, 4))
        print(f"{str(folder)[-40:]:40} {len(traces):5} {total:8.1f}   {told}")


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
