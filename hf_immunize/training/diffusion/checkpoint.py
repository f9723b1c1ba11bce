"""Checkpoints of the loop: safetensors and JSON, each file whole; ``trainer_state.json`` comes last and marks it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_immunize.errors import RecordError
from hf_immunize.records import atomic_write
from hf_immunize.training.core.changing import ChangingPart
from hf_immunize.training.core.sharding import whole_on_cpu
from hf_immunize.training.diffusion.optimizer_state import as_tree, flatten_state, of_tree, restore_state

HELD = "harmful_eval_dataset"
_MODEL, _OPTIMIZER, _MARK = "model.safetensors", "optimizer.safetensors", "trainer_state.json"

_WHOLE = "expected a whole checkpoint of this model and these options"
_WHAT_TO_DO = (
    "resume from a checkpoint that DiffusionImmunizationTrainer wrote, with the options it was written with, or train "
    "into another output_dir."
)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, write: bool = True) -> None:
    """One safetensors file, atomically; every rank takes part, since tensors may be split over them."""
    found = whole_on_cpu(tensors, keep=write)
    if not write:
        return
    part = path.with_name(f".{path.name}.part")  # not by atomic_write: it would hold all bytes once more
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(found, part)
        with part.open("rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise RecordError(
            f"expected to write {path}, got {error}: free disk space or choose a writable folder."
        ) from error


def unmark(folder: Path) -> None:
    """Take the mark off a checkpoint that is about to be rewritten: half of two runs must not pass for one."""
    (folder / _MARK).unlink(missing_ok=True)


def save_loop(
    folder: Path,
    step: int,
    model: ChangingPart,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    log: list[dict[str, float]],
    options: Mapping[str, Any],
    *,
    write: bool = True,
) -> None:
    """Write weights, optimizer and schedule; the mark, which holds ``options``, last.

    Every rank calls this; where not ``write``, a rank only takes part in putting tensors together.
    """
    write_tensors(folder / _MODEL, model.state_dict(), write=write)
    moments, tree = flatten_state(optimizer)
    schedule = as_tree(scheduler.state_dict(), "schedule", moments)
    write_tensors(folder / _OPTIMIZER, moments, write=write)
    plain: dict[str, Any] = {
        "step": step, "log": log, "schedule": schedule, "options": dict(options), "optimizer": tree,
    }
    if write:
        atomic_write(folder / _MARK, json.dumps(plain))


def check_options(folder: Path, options: Mapping[str, Any]) -> None:
    """Raise RecordError unless the checkpoint was written by a run with these options.

    ``max_steps`` may differ where the learning rate does not depend on it: a run can be made longer.
    """
    try:
        written = json.loads((folder / _MARK).read_text(encoding="utf-8"))["options"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{_WHOLE} in {folder}, got {error}: {_WHAT_TO_DO}") from error
    if not isinstance(written, dict):
        raise RecordError(f"{_WHOLE} in {folder}, got options {written!r}: {_WHAT_TO_DO}")
    free = {"max_steps"} if str(options["lr_scheduler_type"]).startswith("constant") else set()
    if None in (options.get(HELD), written.get(HELD)):
        free.add(HELD)  # what is measured on them in the end is measured on the model before immunization again
    names = sorted((written.keys() | options.keys()) - free)
    other = [name for name in names if written.get(name) != options.get(name)]
    if other:
        told = ", ".join(f"{name}={options.get(name)!r} (there {written.get(name)!r})" for name in other)
        raise RecordError(f"expected the options that {folder} was written with, got {told}: {_WHAT_TO_DO}")


def load_loop(
    folder: Path, model: ChangingPart, optimizer: torch.optim.Optimizer, scheduler: Any
) -> tuple[int, list[dict[str, float]]]:
    """Take back what ``save_loop`` wrote, strictly; return the step and the log.

    Raises:
        RecordError: a file is missing or does not fit the model and options.
    """
    try:
        plain = json.loads((folder / _MARK).read_text(encoding="utf-8"))
        model.load_state_dict(load_file(folder / _MODEL), strict=True)
        kept = load_file(folder / _OPTIMIZER)
        restore_state(optimizer, kept, plain["optimizer"])
        scheduler.load_state_dict(of_tree(plain["schedule"], kept))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, SafetensorError) as error:
        raise RecordError(f"{_WHOLE} in {folder}, got {error}: {_WHAT_TO_DO}") from error
    return plain["step"], plain["log"]


def prune_checkpoints(folder: Path, keep: int, step: int) -> None:
    """Delete all but the newest ``keep`` checkpoints up to ``step``; later ones are of another run."""
    numbered = sorted(
        (int(path.name.removeprefix("checkpoint-")), path)
        for path in folder.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit() and int(path.name.removeprefix("checkpoint-")) <= step
    )
    for _, path in numbered[: max(0, len(numbered) - keep)]:
        shutil.rmtree(path)
