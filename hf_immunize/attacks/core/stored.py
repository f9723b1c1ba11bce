"""The record of a run, and whether one on disk tells of the run that is asked for."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path
from typing import Any

from hf_immunize.attacks.core.shape import Attack, Context, Result, Run
from hf_immunize.errors import RunMismatchError
from hf_immunize.records import AttackTrace, Provenance


def check_same(found: AttackTrace, wanted: AttackTrace, path: Path) -> AttackTrace:
    """The trace on disk, when it tells of the same run on the same weights and rows. Raises RunMismatchError."""
    for what in ("attack", "trial", "seed", "role", "config", "model", "data"):
        here, there = _identity(found, what), _identity(wanted, what)
        if not found.model.is_same(wanted.model) if what == "model" else here != there:
            raise RunMismatchError(
                f"expected the run on disk to be this one, got another {what} in {path}: {_short(here)} on disk, "
                f"{_short(there)} asked for. Pass --overwrite to replace it, or choose another output folder."
            )
    return found


def _identity(trace: AttackTrace, what: str) -> Any:
    """What makes two runs the same: content, not the names of folders and sources."""
    if what == "model":
        return trace.model.model_dump(include={"weights", "configuration"})
    return [split.sha256 for split in trace.data] if what == "data" else getattr(trace, what)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 300 else text[:300] + "…"


def trace_of(
    context: Context, name: str, attack: Attack, run: Run, result: Result, provenance: Provenance
) -> AttackTrace:
    """The record of one run."""
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0).isoformat()
    return AttackTrace(
        attack=name,
        family=attack.family,
        trial=run.trial,
        config=dataclasses.asdict(run.config)
        | context.described
        | holdings(context, attack)
        | ({"plugin": attack.plugin.sha256} if attack.plugin else {})
        | ({"tuning_seeds": list(run.tuning)} if run.tuning else {})
        | ({"widened": run.widened} if run.widened else {})
        | ({"proposed": run.proposed} if run.proposed else {})
        | ({"bars": [list(bar) for bar in run.bars]} if run.bars else {})
        | ({} if run.follows else {"adapts": False}),
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
        samples=result.samples,
        flops=result.flops,
        provenance=provenance.model_copy(update={"created": now}),
    )


def holdings(context: Context, attack: Attack) -> dict[str, str | None]:
    """Digests of what the attacker needs beside model and harmful data, so that both sides are given the same."""
    return {need: context.holding(need) for need in attack.needs}
