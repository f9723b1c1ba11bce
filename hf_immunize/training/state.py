"""The trainer's own state inside a checkpoint: one safetensors file and one JSON file, each written atomically."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save

from hf_immunize.errors import RecordError
from hf_immunize.records import atomic_write
from hf_immunize.training.balancing import TermWeights
from hf_immunize.training.guard import UtilityGuard

TENSORS, PLAIN = "immunization_state.safetensors", "immunization_state.json"


def save_state(folder: Path, weights: TermWeights, guard: UtilityGuard, progress: dict[str, list[float]]) -> None:
    """Write what ``load_state`` needs into a checkpoint folder."""
    kept, plain = guard.state()
    tensors = {f"weights.{name}": value for name, value in weights.state().items()}
    tensors |= {f"guard.{name}": value.contiguous() for name, value in kept.items()}
    atomic_write(folder / TENSORS, save({name: value.clone() for name, value in tensors.items()}))
    recent = {name: values[-1:] for name, values in progress.items()}
    atomic_write(folder / PLAIN, json.dumps({"guard": plain, "progress": recent}))


def load_state(folder: Path, weights: TermWeights, guard: UtilityGuard) -> dict[str, list[float]]:
    """Restore weights and guard; return the progress of the terms.

    Raises:
        RecordError: the checkpoint was not written by this trainer, or is incomplete.
    """
    try:
        tensors = load_file(folder / TENSORS)
        plain = json.loads((folder / PLAIN).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordError(
            f"expected {TENSORS} and {PLAIN} in {folder}, got {error}: resume from a checkpoint that "
            "ImmunizationTrainer wrote completely."
        ) from error
    weights.load_state({k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")})
    kept = {k.removeprefix("guard."): v for k, v in tensors.items() if k.startswith("guard.")}
    guard.load_state(kept, plain["guard"])
    return plain["progress"]
