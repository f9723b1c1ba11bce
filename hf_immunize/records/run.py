"""Which run a folder holds, and whether it is finished: two runs are never mixed in one folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from hf_immunize.errors import RunMismatchError
from hf_immunize.records.base import Record
from hf_immunize.records.files import sha256_file
from hf_immunize.records.provenance import Provenance

RUN_FILE = "run.json"
_LOGS = ("runs", "logs")
_MODELS = ("config.json", "model_index.json", "*.safetensors", "*.bin", "checkpoint-*")


class RunRecord(Record):
    """One stage's run in its output folder."""

    stage: str
    fingerprint: str
    """SHA-256 over everything that determines the result: options, data, base weights."""
    inputs: dict[str, JsonValue]
    """What the fingerprint was taken over."""
    finished: bool
    files: dict[str, str]
    """SHA-256 of the result files; empty until finished."""
    provenance: Provenance


def fingerprint_of(inputs: dict[str, Any]) -> str:
    """SHA-256 of the canonical JSON of ``inputs``."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()


def begin_run(folder: str | Path, stage: str, inputs: dict[str, Any], *, write: bool = True) -> bool:
    """Claim a folder for a run; True when that same run is already finished there and its files are intact.

    A claim of a run that stopped before it left anything, as one that was refused for an option, does not count.

    Args:
        folder: output folder.
        stage: name of the stage.
        inputs: JSON-able values that determine the result.
        write: whether this process writes the claim (one per group of processes should).

    Raises:
        RunMismatchError: the folder holds another run, or a finished run whose files have changed.
    """
    path = Path(folder) / RUN_FILE
    fingerprint = fingerprint_of(inputs)
    if path.exists() and _has_content(Path(folder), path):
        held = RunRecord.read(path)
        if held.stage != stage or held.fingerprint != fingerprint:
            keys = {*held.inputs, *inputs}
            changed = sorted(key for key in keys if _plain(held.inputs.get(key)) != _plain(inputs.get(key)))
            raise RunMismatchError(
                f"expected an empty folder or the same run in {folder}, got a {held.stage} run that differs in "
                f"{changed or ['stage']}: choose another output folder, or delete this one."
            )
        if held.finished:
            broken = [name for name, digest in held.files.items() if not _intact(Path(folder) / name, digest)]
            if broken:
                raise RunMismatchError(
                    f"expected the files of the finished run in {folder} unchanged, got changes in {broken}: delete "
                    "the folder and run the stage again."
                )
            return True
    elif not path.exists() and (others := _models_in(Path(folder))):
        raise RunMismatchError(
            f"expected an empty folder or a run of this kind in {folder}, got {', '.join(others[:3])}, which no stage "
            "left there and a run would overwrite: choose another output folder, or move them away."
        )
    elif write:
        _record(stage, fingerprint, inputs, {}).write(path)
    return False


def _models_in(folder: Path) -> list[str]:
    """Names of what makes a folder that of somebody's model: weights, its configuration, checkpoints."""
    found = (path.name for pattern in _MODELS for path in sorted(folder.glob(pattern)))
    return list(dict.fromkeys(found))


def _has_content(folder: Path, claim: Path) -> bool:
    """Whether a run has left anything beside its claim: a result, a checkpoint, a trace; no log and no empty folder."""
    if RunRecord.read(claim).finished:
        return True
    left = (path for path in folder.rglob("*") if path.is_file() and path != claim)
    return any(
        not any(part.startswith(".") or part in _LOGS for part in path.relative_to(folder).parts)
        and not path.name.startswith("events.out.tfevents") and path.suffix not in (".log", ".part")
        for path in left
    )


def finish_run(folder: str | Path, stage: str, inputs: dict[str, Any], files: list[str]) -> RunRecord:
    """Mark the run finished, with the SHA-256 of its result files (names relative to ``folder``)."""
    digests = {name: sha256_file(Path(folder) / name) for name in files}
    record = _record(stage, fingerprint_of(inputs), inputs, digests)
    record.write(Path(folder) / RUN_FILE)
    return record


def _record(stage: str, fingerprint: str, inputs: dict[str, Any], files: dict[str, str]) -> RunRecord:
    return RunRecord(
        stage=stage,
        fingerprint=fingerprint,
        inputs=_plain(inputs),
        finished=bool(files),
        files=files,
        provenance=Provenance.here(),
    )


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, sort_keys=True, default=str))


def _intact(path: Path, digest: str) -> bool:
    return path.is_file() and sha256_file(path) == digest
