"""Check a run file without training: options, data, duplicates, images, model, memory, disk, and the time it will take.

Leaves with exit code 1 where something would make a stage fail later.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hf_immunize.errors import ImmunizeError
from hf_immunize.options import make_options
from hf_immunize.stages.checks.findings import Finding
from hf_immunize.stages.checks.options import check_options, refuse_bad_options
from hf_immunize.stages.workflow.run_file import RunFile
from hf_immunize.stages.workflow.stages import Stage, make_stages

_STYLES = {"ok": "green", "note": "yellow", "fails": "bold red"}


def plan_run(path: str | Path) -> list[Finding]:
    """Everything that was found about a run, in order.

    Raises:
        ConfigError: a file that is no run file.
    """
    from hf_immunize.tasks import find_family

    run = RunFile.read(path)
    stages = make_stages(run)
    parsed, found = check_options(run, stages)
    try:
        family = find_family(run.task)
        (task,) = make_options((family.arguments(),), run.task, f"section task of {run.path}")
    except ImmunizeError as error:
        return [*found, Finding("task", "fails", str(error))]
    checks = _check_classes if family.kind == "classifier" else _check_pipeline
    found += checks(run, stages, parsed, task)
    return [*found, *_state(run, stages)]


def _check_classes(run: RunFile, stages: dict[str, Stage], parsed: Any, task: Any) -> list[Finding]:
    from hf_immunize.stages.checks.model import check_classifier
    from hf_immunize.stages.checks.rows import check_rows

    sides, found = check_rows(task)
    if "benign" in run.sections and "benign" not in sides and task.benign_dataset is None:
        found.append(Finding("benign data", "fails", "expected benign_dataset in the task for the section benign, "
                                                     "got none: "
                             "set it, or remove the section."))
    if run.base is None and "base" not in parsed:
        return found
    return [*found, *check_classifier(run, stages, parsed, sides)]


def _check_pipeline(run: RunFile, stages: dict[str, Stage], parsed: Any, task: Any) -> list[Finding]:
    from hf_immunize.stages.checks.pipeline import check_pipeline_run

    return check_pipeline_run(run, stages, parsed, task)


def _state(run: RunFile, stages: dict[str, Stage]) -> list[Finding]:
    """What of the run is done already."""
    from hf_immunize.stages.workflow.state import State

    state = State(run)
    why = {name: reason for name, stage in stages.items() if (reason := state.why_stale(stage, stages)) is not None}
    again = [f"{name} ({reason})" for name, reason in why.items() if reason not in ("not run yet", "was interrupted")]
    told = f"{len(stages) - len(why)} of {len(stages)} done"
    return [Finding("stages", "ok", told + (f"; again: {', '.join(again)}" if again else ""))]


def show(found: Sequence[Finding]) -> None:
    """A table on the terminal."""
    console = Console()
    if not console.is_terminal:
        console.width = 120
    table = Table(show_lines=False)
    for column in ("checked", "", "found"):
        table.add_column(column, overflow="fold")
    for finding in found:
        table.add_row(Text(finding.part), Text(finding.level, style=_STYLES[finding.level]), Text(finding.told))
    console.print(table)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """The verb on words of a command line; the exit code."""
    from argparse import SUPPRESS, ArgumentParser

    parser = ArgumentParser(description=(__doc__ or "").partition("\n\n")[0], prog=prog)
    parser.add_argument("file", help="The run file; hf-immunize init writes one.")
    parser.add_argument("--json", action="store_true", help="Print plain data for scripts.")
    parser.add_argument("--only_options", "--only-options", action="store_true", help=SUPPRESS)
    given = parser.parse_args(argv)
    if given.only_options:
        run = RunFile.read(given.file)
        refuse_bad_options(run, make_stages(run))
        return 0
    found = plan_run(given.file)
    if given.json:
        sys.stdout.write(json.dumps([finding.as_json() for finding in found], indent=1, ensure_ascii=False) + "\n")
    else:
        show(found)
    bad = [finding for finding in found if finding.level == "fails"]
    if bad and not given.json:
        print(f"{len(bad)} of {len(found)} checks found what would stop the run: repair it, and plan again.")
    return 1 if bad else 0
