"""How close the order in which processes take an exam's runs is to the best schedule: 1, 2 and 4 simulated devices.

    python benchmarks/exam_schedule.py runs/digits-vit/base/traces/control runs/digits-vit/*/traces/subject

Reads the seconds that the runs of a finished exam took (traces of one folder are one exam), lets simulated devices take
them as ``run_suite`` hands them out (longest planned first; those of a batched attack as one job; finalists after all
first runs) and compares the end with what no schedule can beat: in each of the two rounds the mean load, and the
longest job.
"""

from __future__ import annotations

import argparse
import heapq
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from hf_immunize.attacks import ATTACKS, TRAINABILITY
from hf_immunize.attacks.core.plan import is_searchable
from hf_immunize.records import AttackTrace

TABLE = {**ATTACKS, **TRAINABILITY}
Job = tuple[tuple[bool, int], float]
"""What is known of a job before it is made, and the seconds it takes."""


def jobs_of(traces: Sequence[AttackTrace]) -> list[Job]:
    """Jobs, longest planned first."""
    together: dict[str, list[AttackTrace]] = defaultdict(list)
    for trace in traces:
        together[trace.attack if TABLE[trace.attack].batched else trace.file_name].append(trace)
    jobs = [
        (
            (is_searchable(TABLE[runs[0].attack]), sum(int(run.config.get("steps", 1)) for run in runs)),
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


def main() -> None:
    """Print a row for every exam."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="Folders of traces.")
    print(f"{'exam':40} {'runs':>5} {'seconds':>8}   schedule / bound on 1, 2 and 4 devices")
    for folder in parser.parse_args().folders:
        traces = [AttackTrace.read(path) for path in sorted(folder.glob("*.json"))]
        parts = rounds([trace for trace in traces if trace.attack in TABLE])
        ratios = []
        for devices in (1, 2, 4):
            best = sum(bound(jobs, devices) for jobs in parts)
            ratios.append(sum(makespan(jobs, devices) for jobs in parts) / best if best else 1.0)
        total = sum(trace.seconds for trace in traces)
        print(f"{str(folder)[-40:]:40} {len(traces):5} {total:8.1f}   " + "  ".join(f"{ratio:.3f}" for ratio in ratios))


if __name__ == "__main__":
    main()
