"""What the rooms for classifiers and for diffusion models share: from traces on disk to cells and verdicts."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_immunize.attacks import Attack
from hf_immunize.certification.cells import Traces, build_cell, own_threshold, reference_threshold
from hf_immunize.certification.evidence import control_traces, read_traces, trace_hashes
from hf_immunize.certification.trainability import measure_trainability
from hf_immunize.certification.verdict import family_verdicts, overall_verdict, statement
from hf_immunize.errors import IncompleteExamError, ModelError, RecordError
from hf_immunize.exam import Protocol
from hf_immunize.records import (
    AttackTrace,
    Cell,
    DatasetFingerprint,
    ModelFingerprint,
    Trainability,
    Utility,
    loading_files,
)


@dataclass(frozen=True)
class Sides:
    """Folders and fingerprints of the model under test and of its base."""

    folder: Path
    base_folder: Path
    subject: ModelFingerprint
    control: ModelFingerprint


@dataclass(frozen=True)
class Judgement:
    """Every trace by role, and what was judged from them."""

    everything: Mapping[str, Sequence[AttackTrace]]
    cells: list[Cell]
    trainability: list[Trainability]

    @property
    def traces(self) -> list[AttackTrace]:
        """All of them."""
        return [trace for found in self.everything.values() for trace in found]

    def fields(self, sides: Sides, protocol: Protocol, utility: Utility, given: float | None) -> dict[str, Any]:
        """The fields of the certificate that follow from the judgement and the utility."""
        rule, cells, benign = protocol.rule, self.cells, self.trainability
        return {
            "protocol": protocol.name, "planned": list(protocol.attacks),
            "subject": sides.subject, "control": sides.control, "utility": utility, "cells": cells,
            "families": family_verdicts(cells), "overall": overall_verdict(cells, utility, rule, benign),
            "statement": statement(cells, utility, rule, sides.subject.name, benign), "rule": rule.in_words(),
            "threshold_rule": rule.threshold_in_words() if given is None else "Given by hand.",
            "trainability": benign, "files": loading_files(sides.folder),
            "traces": trace_hashes(sides.folder, self.everything), "expires": _expiry(rule.valid_days),
        }


def judge_traces(
    sides: Sides, attacks: Mapping[str, Attack], methods: Mapping[str, Attack], protocol: Protocol, *,
    harmful: Sequence[DatasetFingerprint], benign: Sequence[DatasetFingerprint], threshold: float | None,
) -> Judgement:
    """Read the traces of both sides, copy those of the control, and judge every cell.

    Args:
        attacks, methods: tables of the attacks and of the methods by which a benign task is learned.

    Raises:
        IncompleteExamError: no control traces, or a control that sat another exam.
        ModelError: a base of another architecture.
        RecordError: traces that are broken, of other weights, or of other data.
    """
    rule, lowest = protocol.rule, -math.inf if protocol.rule.gain else 0.0
    _check_comparable(sides.control, sides.subject)
    known = {**attacks, **methods}
    everything = {"subject": read_traces(sides.folder, "subject", sides.subject, known, lowest)}
    everything |= control_traces(sides.folder, sides.base_folder, sides.control, known, lowest)
    traces, learned = (
        {role: [trace for trace in found if trace.attack in table] for role, found in everything.items()}
        for table in (attacks, methods)
    )
    _check_data(traces, harmful, "harmful")
    _check_data(learned, benign, "benign")
    _check_base_held(traces, attacks)
    cells = _cells(traces, attacks, protocol, threshold, harmful[-1])
    return Judgement(everything, cells, measure_trainability(learned, rule))


def _expiry(days: int) -> str:
    return (datetime.datetime.now(datetime.UTC).date() + datetime.timedelta(days=days)).isoformat()


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


def _cells(
    traces: Traces, table: Mapping[str, Attack], protocol: Protocol, given: float | None, test: DatasetFingerprint
) -> list[Cell]:
    """One cell for every attack that is planned or was run on any side; none can be left out."""
    rule = protocol.rule
    common = reference_threshold(traces["control"], rule) if given is None else given

    def threshold(name: str) -> float:
        if given is not None or not table[name].own_threshold:
            return common
        control = [trace for trace in traces["control"] if trace.attack == name]
        own = own_threshold(control, 1 / max(len(test.classes), 1), rule)
        return common if own is None else own

    run = {trace.attack for found in traces.values() for trace in found}
    names = [name for name in table if name in run or name in protocol.attacks]
    return [
        build_cell(
            name,
            table[name],
            {role: [trace for trace in found if trace.attack == name] for role, found in traces.items()},
            threshold(name),
            test.rows,
            rule,
        )
        for name in names
    ]


def _check_data(traces: Traces, splits: Sequence[DatasetFingerprint], task: str) -> None:
    """Raise RecordError for a trace of other data than the exam's."""
    wanted = [fingerprint.sha256 for fingerprint in splits]
    for role, found in traces.items():
        for trace in found:
            if [fingerprint.sha256 for fingerprint in trace.data] != wanted:
                raise RecordError(
                    f"expected traces on the {task} splits of this exam, got other rows in {role}/{trace.file_name}: "
                    "certify with the task options (dataset, labels, splits, split_seed) the attacks were run with."
                )


def _check_base_held(traces: Traces, table: Mapping[str, Attack]) -> None:
    """Raise IncompleteExamError where the sides were given different bases: a wrong one weakens the attack."""
    held = {role: {trace.config.get("base") for trace in found if table[trace.attack].needs == ("base",)}
            for role, found in traces.items() if role != "scratch"}
    if len(set().union(*held.values())) > 1:
        raise IncompleteExamError(
            "expected attackers of subject and control to hold the same base, got different ones: run "
            "hf-immunize attack with the same --base_path on both."
        )
