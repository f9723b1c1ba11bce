"""Run the stages of one experiment in order, each with `accelerate launch`; independent stages run side by side.

    python recipes/pipeline.py recipes/digits-vit/pipeline.yaml

A stage whose results are already there says so and costs only its start. What a stage prints goes to <runs>/logs/.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import yaml

ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]


@dataclass(frozen=True)
class Stage:
    """One command: a recipe, its options, and the stages whose results it needs."""

    name: str
    run: str
    needs: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


@dataclass
class Pipeline:
    """Stages by name, and where their logs go."""

    runs: Path
    hardware: str
    stages: dict[str, Stage] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str) -> Pipeline:
        """Read a pipeline file; a stage that needs an unknown or a later one is an error."""
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        pipeline = cls(Path(loaded["runs"]), loaded["hardware"])
        for name, entry in loaded["stages"].items():
            needs = tuple(entry.get("needs", ()))
            unknown = [other for other in needs if other not in pipeline.stages]
            if unknown:
                sys.exit(f"{path}: expected stage '{name}' to need earlier stages, got {unknown}.")
            pipeline.stages[name] = Stage(name, entry["run"], needs, tuple(shlex.split(entry.get("options", ""))))
        return pipeline

    def command(self, stage: Stage) -> list[str]:
        """The shell words of a stage."""
        return [*ACCELERATE, self.hardware, stage.run, *stage.options]


def run_stage(pipeline: Pipeline, stage: Stage, threads: int) -> tuple[int, float, Path]:
    """Run one stage; return its exit status, seconds and log."""
    log = pipeline.runs / "logs" / f"{stage.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    start = time.perf_counter()
    with open(log, "w", encoding="utf-8") as stream:
        done = subprocess.run(pipeline.command(stage), stdout=stream, stderr=subprocess.STDOUT, env=environment)
    return done.returncode, time.perf_counter() - start, log


def run_all(pipeline: Pipeline, jobs: int) -> None:
    """Run every stage as soon as its needs are met, at most ``jobs`` at a time; stop at the first failure."""
    cores = os.cpu_count() or 1
    threads = max(1, cores // jobs)
    waiting, done, total = dict(pipeline.stages), set(), len(pipeline.stages)
    running: dict[Future, Stage] = {}
    with ThreadPoolExecutor(jobs) as pool:
        while waiting or running:
            ready = [stage for stage in waiting.values() if set(stage.needs) <= done]
            for stage in ready[: jobs - len(running)]:
                running[pool.submit(run_stage, pipeline, stage, threads)] = waiting.pop(stage.name)
                print(f"        {stage.name} …", flush=True)
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                stage = running.pop(future)
                status, seconds, log = future.result()
                if status:
                    pool.shutdown(cancel_futures=True)
                    tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])
                    sys.exit(f"{stage.name} failed after {seconds:.0f} s; the end of {log}:\n{tail}")
                done.add(stage.name)
                print(f"[{len(done):2d}/{total}] {stage.name}: {last_line(log)} ({seconds:.0f} s)", flush=True)


def last_line(log: Path) -> str:
    """The last thing a stage printed, without the progress bars that share its line."""
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip() and "it/s]" not in line), "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipeline", help="YAML file that lists the stages.")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="Stages at a time.")
    arguments = parser.parse_args()
    pipeline = Pipeline.read(arguments.pipeline)
    start = time.perf_counter()
    run_all(pipeline, max(1, arguments.jobs))
    final = list(pipeline.stages)[-1]
    print((pipeline.runs / "logs" / f"{final}.log").read_text(encoding="utf-8"))
    print(f"done in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
