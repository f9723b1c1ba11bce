"""Whether a trace on disk tells of the run that is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_immunize.errors import RunMismatchError
from hf_immunize.records import AttackTrace


def check_same(found: AttackTrace, wanted: AttackTrace, path: Path) -> AttackTrace:
    """The trace on disk, when it tells of the same run on the same weights and rows. Raises RunMismatchError."""
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
