"""Run attacks and keep one trace file per run; a run that is already on disk is not made again."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_immunize.attacks.context import AttackContext
from hf_immunize.attacks.plan import find_attack, plan_runs
from hf_immunize.attacks.shape import Attack, Result, Run
from hf_immunize.errors import RunMismatchError
from hf_immunize.records import AttackTrace, Provenance

_NOT_RUN = Result([], 1, 0.0, "diverged", "not run")


@dataclasses.dataclass(frozen=True)
class SuiteSummary:
    """How many runs were made now, how many were there already, and how many of all diverged."""

    made: int
    kept: int
    diverged: int


def run_suite(
    context: AttackContext,
    table: Mapping[str, Attack],
    names: Sequence[str],
    seeds: Sequence[int],
    folder: str | Path,
    settings: Mapping[str, Mapping[str, Sequence[Any]]] | None = None,
    *,
    overwrite: bool = False,
    progress: Callable[[AttackTrace, bool], None] | None = None,
) -> SuiteSummary:
    """Run every (attack, trial, seed) that has no valid trace yet and write its trace to ``folder/traces/<role>/``.

    Args:
        progress: called once per run with its trace and whether it was made now.

    Raises:
        RunMismatchError: a trace file of the same name tells of other weights, data or settings, and ``overwrite`` is
            off. Nothing is run in that case.
        RecordError: a trace file that cannot be read, and ``overwrite`` is off.
    """
    target = Path(folder) / "traces" / context.role
    provenance = Provenance.here(context.device)
    kept: list[AttackTrace] = []
    missing: dict[str, list[Run]] = {}
    for name in names:
        attack = find_attack(name, table)
        for run in plan_runs(attack, seeds, (settings or {}).get(name)):
            # What a run would write, with an empty result: everything that must agree with a file already there.
            blank = trace_of(context, name, attack, run, _NOT_RUN, provenance)
            path = target / blank.file_name
            if path.exists() and not overwrite:
                kept.append(_check_same(AttackTrace.read(path), blank, path))
            else:
                missing.setdefault(name, []).append(run)
    for trace in kept if progress else ():
        progress(trace, False)
    made = _make(context, table, missing, target, provenance, progress)
    diverged = sum(trace.outcome == "diverged" for trace in [*kept, *made])
    return SuiteSummary(len(made), len(kept), diverged)


def _make(
    context: AttackContext,
    table: Mapping[str, Attack],
    missing: Mapping[str, Sequence[Run]],
    target: Path,
    provenance: Provenance,
    progress: Callable[[AttackTrace, bool], None] | None,
) -> list[AttackTrace]:
    """Run what is missing and write each trace as soon as it is there."""
    made = []
    for name, runs in missing.items():
        for run, result in table[name].run(context, runs):
            trace = trace_of(context, name, table[name], run, result, provenance)
            trace.write(target / trace.file_name)
            made.append(trace)
            if progress:
                progress(trace, True)
    return made


def trace_of(
    context: AttackContext, name: str, attack: Attack, run: Run, result: Result, provenance: Provenance
) -> AttackTrace:
    """The record of one run."""
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0).isoformat()
    return AttackTrace(
        attack=name,
        family=attack.family,
        trial=run.trial,
        config=dataclasses.asdict(run.config) | context.described,
        seed=run.seed,
        role=context.role,
        model=context.fingerprint,
        data=list(context.data),
        unit=attack.unit,
        budget=result.budget,
        curve=list(result.curve),
        outcome=result.outcome,
        note=result.note,
        seconds=round(result.seconds, 4),
        provenance=provenance.model_copy(update={"created": now}),
    )


def _check_same(found: AttackTrace, wanted: AttackTrace, path: Path) -> AttackTrace:
    """The trace on disk, when it tells of the same run on the same weights and rows."""
    for what in ("attack", "trial", "seed", "role", "config", "model", "data"):
        here, there = _identity(found, what), _identity(wanted, what)
        if here != there:
            raise RunMismatchError(
                f"expected the run on disk to be this one, got another {what} in {path}: {_short(here)} on disk, "
                f"{_short(there)} asked for. Pass --overwrite to replace it, or choose another output folder."
            )
    return found


def _identity(trace: AttackTrace, what: str) -> Any:
    """What makes two runs the same: content, not the names of folders and sources."""
    if what == "model":
        return trace.model.model_dump(exclude={"name", "revision"})
    return [split.sha256 for split in trace.data] if what == "data" else getattr(trace, what)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 300 else text[:300] + "…"
