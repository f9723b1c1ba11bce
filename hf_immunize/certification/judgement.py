"""What the rooms for classifiers and for diffusion models share: from two folders to what the judge is given."""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hf_immunize.certification.evidence import control_traces, read_traces, trace_hashes
from hf_immunize.certification.planning import plan_exam
from hf_immunize.errors import IncompleteExamError, ModelError
from hf_immunize.exam import Protocol
from hf_immunize.records import AttackTrace, ModelFingerprint, Plan, loading_files

if TYPE_CHECKING:
    from hf_immunize.attacks import Attack


@dataclass(frozen=True)
class Sides:
    """Folders and fingerprints of the model under test and of its base."""

    folder: Path
    base_folder: Path
    subject: ModelFingerprint
    control: ModelFingerprint


@dataclass(frozen=True)
class Gathered:
    """Every trace by role as it lies on disk, and the plan they were made by."""

    by_role: Mapping[str, Sequence[AttackTrace]]
    plan: Plan
    sides: Sides

    @property
    def traces(self) -> list[AttackTrace]:
        """All of them."""
        return [trace for found in self.by_role.values() for trace in found]

    @property
    def evidence(self) -> dict[str, Any]:
        """Fields of ``Evidence`` that speak of files."""
        return {
            "subject": self.sides.subject, "control": self.sides.control, "files": loading_files(self.sides.folder),
            "traces": trace_hashes(self.sides.folder, self.by_role),
        }


def gather(
    sides: Sides, attacks: Mapping[str, Attack], methods: Mapping[str, Attack], protocol: Protocol,
    threshold: float | None, references: Mapping[str, Attack] | None = None,
) -> Gathered:
    """Read the traces of both sides and copy those of the control beside the subject's.

    Args:
        attacks, methods: tables of the attacks and of the methods by which a benign task is learned.
        threshold: harmful score that counts as success, where it is given by hand.
        references: attackers without the model.

    Raises:
        IncompleteExamError: no control traces.
        ModelError: a base of another architecture.
        RecordError: traces that are broken or of other weights.
    """
    lowest = -math.inf if protocol.rule.gain else 0.0
    _check_comparable(sides.control, sides.subject)
    known = ChainMap(*(cast("dict[str, Attack]", table) for table in (attacks, methods, references or {})))
    found = {"subject": read_traces(sides.folder, "subject", sides.subject, known, lowest)}
    found |= control_traces(sides.folder, sides.base_folder, sides.control, known, lowest)
    return Gathered(found, plan_exam(protocol, attacks, methods, found, threshold), sides)


def check_base(folder: Path) -> None:
    """Raise IncompleteExamError unless the base's folder is there."""
    if not folder.is_dir():
        raise IncompleteExamError(
            f"expected the un-immunized base model in {folder}, got no such folder: a certificate compares with the "
            "base, so save it with save_pretrained, attack it with --role control, and pass it as --base_path."
        )


def _check_comparable(control: ModelFingerprint, subject: ModelFingerprint) -> None:
    """Raise ModelError unless the base has the subject's architecture and size."""
    if (control.architecture, control.parameters) != (subject.architecture, subject.parameters):
        raise ModelError(
            f"expected a base of the subject's architecture, {subject.architecture} with {subject.parameters} "
            f"parameters, got {control.architecture} with {control.parameters}: pass the model that was immunized."
        )
