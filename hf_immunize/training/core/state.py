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

ABSENT = "none"
"""The digest of a dataset that a run does not have."""
TENSORS, PLAIN = "immunization_state.safetensors", "immunization_state.json"


class Stateful(Protocol):
    """Something whose whole state is tensors."""

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what ``state`` returned."""


class CheckpointState:
    """What a resumed run needs beside weights, optimizer and schedule.

    Args:
        parts: by the name they have in the file; None where a run has none of the kind.
    """

    def __init__(self, parts: Mapping[str, Stateful | None], guard: UtilityGuard, watch: Watch):
        self._parts = {name: part for name, part in parts.items() if part is not None}
        self._guard, self._watch = guard, watch
        self.identity: Mapping[str, str] = {}
        """Digests of what the run started from, by name; another run's checkpoint is refused."""
        self.options: Mapping[str, str] = {}
        """Options that decide what the guard compares, by name; a checkpoint of others is refused."""

    def save(self, folder: Path, *, write: bool = True) -> None:
        """Write both files into a checkpoint folder, with whole tensors where they are split over ranks.

        Every rank calls this; where not ``write``, a rank only takes part in putting tensors together.
        """
        kept, plain = self._guard.state()
        tensors = {f"guard.{name}": value for name, value in kept.items()}
        for part, stateful in self._parts.items():
            tensors |= {f"{part}.{name}": value for name, value in stateful.state().items()}
        found, watched = whole_on_cpu(tensors, keep=write), self._watch.state()
        told = {"guard": plain, "watch": watched, "identity": dict(self.identity), "options": dict(self.options)}
        if write:
            atomic_write(folder / TENSORS, save(found))
            atomic_write(folder / PLAIN, json.dumps(told))

    def load(self, folder: Path) -> None:
        """Restore every part, the guard and the watch.

        Raises:
            RecordError: the checkpoint was not written by this trainer, is incomplete, or was written without one of
                the parts (an option was changed).
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
        self._refuse_options(plain.get("options", {}), folder)
        self._refuse_another(plain.get("identity", {}), folder)
        for part, stateful in self._parts.items():
            try:
                stateful.load_state(_under(tensors, part))
            except KeyError as error:
                raise RecordError(
                    f"expected {error.args[0]!r} of {part} in {folder / TENSORS}, got a checkpoint without: resume "
                    "with the options it was written with."
                ) from error
        self._guard.load_state(_under(tensors, "guard"), guarded)
        self._watch.load_state(watched)

    def _refuse_options(self, written: Mapping[str, str], folder: Path) -> None:
        known = sorted(written.keys() & self.options.keys())
        if other := [name for name in known if written[name] != self.options[name]]:
            told = ", ".join(f"{name}={self.options[name]} (there {written[name]})" for name in other)
            raise RecordError(
                f"expected the options that {folder} was written with, got {told}: what the guard compares would be "
                "two different things. Resume with the options of that run, or train into another output_dir."
            )

    def _refuse_another(self, written: Mapping[str, str], folder: Path) -> None:
        # Who guards nothing may begin to watch; a guard has no base in such a checkpoint.
        free = {name for name, digest in written.items() if digest == ABSENT and self._guard.allowed is None}
        known = (written.keys() & self.identity.keys()) - free
        other = sorted(name for name in known if written[name] != self.identity[name])
        if other:
            raise RecordError(
                f"expected the {' and '.join(other)} that {folder} was written with, got other content: resume with "
                "the model from before immunization and the rows of that run, or train into another output_dir."
            )


def _under(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}."): v for name, v in tensors.items() if name.startswith(f"{part}.")}
