"""Checkpoints of the loop: safetensors and JSON, each file whole; ``trainer_state.json`` comes last and marks it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from hf_immunize.errors import RecordError
from hf_immunize.records import atomic_write
from hf_immunize.training.core.changing import ChangingPart
from hf_immunize.training.core.sharding import split_like, whole_on_cpu

_MODEL, _OPTIMIZER, _MARK = "model.safetensors", "optimizer.safetensors", "trainer_state.json"

_WHOLE = "expected a whole checkpoint of this model and these options"
_WHAT_TO_DO = (
    "resume from a checkpoint that DiffusionImmunizationTrainer wrote, with the options it was written with, or train "
    "into another output_dir."
)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, write: bool = True) -> None:
    """One safetensors file, atomically; every rank takes part, since tensors may be split over them."""
    found = whole_on_cpu(tensors, keep=write)
    if write:
        atomic_write(path, save(found))


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
    moments = optimizer.state_dict()["state"]
    write_tensors(
        folder / _OPTIMIZER,
        {f"{index}.{name}": torch.as_tensor(value) for index, kept in moments.items() for name, value in kept.items()},
        write=write,
    )
    plain: dict[str, Any] = {"step": step, "log": log, "schedule": scheduler.state_dict(), "options": dict(options)}
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
        _load_moments(optimizer, load_file(folder / _OPTIMIZER), model.parameters)
        scheduler.load_state_dict(plain["schedule"])
        for group, rate in zip(optimizer.param_groups, plain["schedule"]["_last_lr"], strict=True):
            group["lr"] = rate
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise RecordError(f"{_WHOLE} in {folder}, got {error}: {_WHAT_TO_DO}") from error
    return plain["step"], plain["log"]


def _load_moments(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], parameters: Sequence[Tensor]
) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        whose = parameters[int(index)]
        state.setdefault(int(index), {})[name] = split_like(value, whose) if value.shape == whose.shape else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def prune_checkpoints(folder: Path, keep: int, step: int) -> None:
    """Delete all but the newest ``keep`` checkpoints up to ``step``; later ones are of another run."""
    numbered = sorted(
        (int(path.name.removeprefix("checkpoint-")), path)
        for path in folder.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit() and int(path.name.removeprefix("checkpoint-")) <= step
    )
    for _, path in numbered[: max(0, len(numbered) - keep)]:
        shutil.rmtree(path)
