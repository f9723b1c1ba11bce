"""Run all stages of a run file, or those that are asked for: base, immunized models, attacks, certificates, report.

What is done and unchanged is not run again, also after a kill: every stage is known by its options, by the content of
what it reads and of what it left. Results that another option makes obsolete are moved to output_dir/replaced.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from hf_immunize.errors import ConfigError
from hf_immunize.records import Certificate
from hf_immunize.stages.workflow.launch import Launcher
from hf_immunize.stages.workflow.run_file import RunFile
from hf_immunize.stages.workflow.runner import Runner, choose_again
from hf_immunize.stages.workflow.stages import Stage, choose, make_stages
from hf_immunize.stages.workflow.state import Lock, State

CERTIFICATE = "certificate.json"


@dataclass
class RunOptions:
    """Which stages, and on what.

    Args:
        stage: stages, or verbs for all of theirs; all by default.
        again: stages that are run anew, with all that needs them.
        jobs: stages at a time; the run file's by default.
        accelerate_config: option file of ``accelerate launch``; the run file's ``hardware`` by default.
        num_processes: processes of the stages that train.
        dry_run: say what would be run, and stop.
        quiet: progress goes to standard error, and nothing else is said.
    """

    stage: list[str] | None = None
    again: list[str] | None = None
    jobs: int | None = None
    accelerate_config: str | None = None
    num_processes: int | None = None
    dry_run: bool = False
    quiet: bool = False


def run_file(path: str | Path, options: RunOptions | None = None) -> dict[str, str]:
    """Run what is not done yet; return the stages that had to be run, each with the reason.

    Raises:
        ConfigError: a run file or options that cannot be run, found before the first stage starts.
        StageError: a stage that failed.
        RunMismatchError: another run at work in the same folder.
    """
    options, run = options or RunOptions(), RunFile.read(path)
    stages, state = make_stages(run), State(run)
    again = choose_again(stages, choose(stages, options.again or []))
    chosen = choose(stages, options.stage or []) or list(stages)
    chosen = [name for name in stages if name in {*chosen, *(again if options.stage is None else [])}]
    if options.jobs is not None and options.jobs < 1:
        raise ConfigError(f"expected at least one stage at a time, got --jobs {options.jobs}.")
    jobs, hardware = options.jobs or run.jobs, options.accelerate_config or run.hardware
    if hardware is not None and not Path(hardware).is_file():
        raise ConfigError(f"expected an option file of accelerate launch, got {hardware!r}: there is none. Check "
                          "hardware.")
    launcher = Launcher(hardware, options.num_processes, max(1, jobs))
    runner = Runner(stages, state, launcher, max(1, jobs), chosen, [name for name in again if name in chosen])
    why = runner.expected()
    if options.dry_run:
        told = sys.stderr if options.quiet else sys.stdout
        print("\n".join(f"{name}: {why.get(name, 'done before, unchanged')}" for name in chosen), file=told)
        return why
    with Lock(run.output_dir) as lock:
        _check_options(run, [stages[name] for name in why])
        start = time.perf_counter()
        runner.run(lock, Console(stderr=True, highlight=False, markup=False, soft_wrap=True) if options.quiet else None)
    if options.quiet:
        return why
    report = state.root / "logs" / "report.log"
    if "report" in chosen and report.is_file():
        print(report.read_text(encoding="utf-8").rpartition("\n$ ")[2].partition("\n")[2].rstrip())
    print(f"done in {time.perf_counter() - start:.0f} s")
    return why


def summary(path: str | Path, why: dict[str, str]) -> dict[str, Any]:
    """What a run came to, as plain data: the stages that were run or would be, and every model that has a verdict."""
    run = RunFile.read(path)
    models = {}
    for stage in make_stages(run).values():
        if stage.kind == "certify" and (stage.folder / CERTIFICATE).is_file():
            certificate = Certificate.read(stage.folder / CERTIFICATE)
            models[stage.folder.name] = {
                "folder": str(stage.folder), "overall": certificate.overall, "statement": certificate.statement,
                "cells": {cell.attack: cell.verdict for cell in certificate.cells},
            }  # fmt: skip
    return {"output_dir": str(run.output_dir), "stages": why, "models": models}


def _check_options(run: RunFile, stale: Sequence[Stage]) -> None:
    """Read the options of every stage that will be run, in a process of its own: the last one's typing error shall not
    show after hours, and this process stays small.

    Raises:
        ConfigError: what that process says.
    """
    if not stale:
        return
    words = [sys.executable, "-m", "hf_immunize.cli", "plan", str(run.path), "--only-options"]
    done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        told = (done.stderr.strip() or done.stdout.strip()).removeprefix("ConfigError: ")
        raise ConfigError(told)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """The verb on words of a command line."""
    from argparse import ArgumentParser

    parser = ArgumentParser(description=(__doc__ or "").partition("\n\n")[0], prog=prog)
    parser.add_argument("file", help="The run file; hf-immunize init writes one.")
    parser.add_argument("--stage", action="append", metavar="NAME", help="Run this stage alone, or all stages of this "
                        "verb; may be repeated. What they need has to be done.")
    parser.add_argument("--from", dest="again", action="append", metavar="NAME", help="Run this stage anew though "
                        "nothing changed, and all that needs it; may be repeated.")
    parser.add_argument("--jobs", type=int, help="Stages that run at the same time; the run file's jobs by default.")
    parser.add_argument("--accelerate_config", "--accelerate-config", metavar="FILE.yaml",
                        help="Option file of accelerate "
                        "launch for the stages that train; the run file's hardware by default.")
    parser.add_argument("--num_processes", "--num-processes", type=int, help="Processes of the stages that train, as "
                        "accelerate launch takes it.")
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="Say what would be run and why, and stop.")
    parser.add_argument("--json", dest="quiet", action="store_true", help="Print plain data for scripts at the end; "
                        "progress goes to standard error.")
    given = vars(parser.parse_args(argv))
    file = given.pop("file")
    why = run_file(file, RunOptions(**{item.name: given[item.name] for item in dataclasses.fields(RunOptions)}))
    if given["quiet"]:
        print(json.dumps(summary(file, why), indent=1, ensure_ascii=False))
