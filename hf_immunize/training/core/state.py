"""The trainer's own state inside a checkpoint: one safetensors file and one JSON file, each written atomically."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from hf_immunize.errors import RecordError
from hf_immunize.records import atomic_write
from hf_immunize.training.core.guard import UtilityGuard
from hf_immunize.training.core.sharding import whole_on_cpu
from hf_immunize.training.core.watch import Watch

TENSORS, PLAIN = "immunization_state.safetensors", "immunization_state.json"


class Stateful(Protocol):
    """Something whose whole state is tensors."""

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what ``state`` returned."""


def save_state(
    folder: Path, parts: Mapping[str, Stateful], guard: UtilityGuard, watch: Watch, *, write: bool = True
) -> None:
    """Write what ``load_state`` needs into a checkpoint folder; tensors that are split over ranks are written whole.

    Every rank calls this; where not ``write``, a rank only takes part in putting tensors together.
    """
    kept, plain = guard.state()
    tensors = {f"guard.{name}": value for name, value in kept.items()}
    for part, stateful in parts.items():
        tensors |= {f"{part}.{name}": value for name, value in stateful.state().items()}
    found = whole_on_cpu(tensors, keep=write)
    if write:
        atomic_write(folder / TENSORS, save(found))
        atomic_write(folder / PLAIN, json.dumps({"guard": plain, "watch": watch.state()}))


def load_state(folder: Path, parts: Mapping[str, Stateful], guard: UtilityGuard, watch: Watch) -> None:
    """Restore every part, the guard and the watch.

    Raises:
        RecordError: the checkpoint was not written by this trainer, is incomplete, or was written without one of the
            parts (an option was changed).
    """
    try:
        tensors = load_file(folder / TENSORS)
        plain = json.loads((folder / PLAIN).read_text(encoding="utf-8"))
        guarded, watched = plain["guard"], plain["watch"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise RecordError(
            f"expected {TENSORS} and {PLAIN} in {folder}, got {error}: resume from a checkpoint that "
            "ImmunizationTrainer wrote completely."
        ) from error
    for part, stateful in parts.items():
        found = {k.removeprefix(f"{part}."): v for k, v in tensors.items() if k.startswith(f"{part}.")}
        try:
            stateful.load_state(found)
        except KeyError as error:
            raise RecordError(
                f"expected {error.args[0]!r} of {part} in {folder / TENSORS}, got a checkpoint without: resume with "
                "the options it was written with."
            ) from error
    kept = {k.removeprefix("guard."): v for k, v in tensors.items() if k.startswith("guard.")}
    guard.load_state(kept, guarded)
    watch.load_state(watched)
