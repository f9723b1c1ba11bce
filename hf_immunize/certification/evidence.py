"""Traces as evidence: read strictly, tied to the weights on disk, copied beside the certificate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_immunize.certification.plugins import refuse_other_code
from hf_immunize.errors import IncompleteExamError, RecordError
from hf_immunize.records import AttackTrace, ModelFingerprint, atomic_write, sha256_file

if TYPE_CHECKING:
    from hf_immunize.attacks import Attack


def read_traces(
    folder: str | Path, role: str, model: ModelFingerprint, table: Mapping[str, Attack], lowest: float = 0.0
) -> list[AttackTrace]:
    """Every trace of ``folder/traces/<role>``, checked against the weights it must speak of.

    Scores lie in ``lowest``..1: accuracies in 0..1, R² anywhere below 1.

    Raises:
        RecordError: a file that is truncated, misnamed, of other weights than ``model``, or of an attack that is not
            known here or whose plug-in has other code here.
    """
    traces = []
    for path in sorted((Path(folder) / "traces" / role).glob("*.json")):
        trace = AttackTrace.read(path)
        refuse_other_code(trace, table, str(path))
        if trace.role != role or path.name != trace.file_name:
            raise RecordError(
                f"expected {path} to be named after its run, got {trace.role}/{trace.file_name} inside: it was renamed "
                "or edited; make it again."
            )
        if any(not lowest <= value <= 1 for point in trace.curve for value in (point.validation, point.test)):
            scores = "accuracies in 0..1" if lowest == 0 else "scores of at most 1"
            raise RecordError(f"expected {scores} in {path}, got others: it was edited; make it again.")
        same_weights = trace.model.is_same(model)
        if role == "nothing":
            same_weights = not trace.model.weights
        if role == "alternative":  # any model but the base itself, whose uplift it would take away
            same_weights = bool(trace.model.weights) and trace.model.weights != model.weights
        if role == "scratch":
            same_weights = (trace.model.architecture, trace.model.parameters) == (model.architecture, model.parameters)
        if not same_weights:
            raise RecordError(
                f"expected a trace of the weights of {model.name} as they are on disk, got one of other weights, or of "
                f"another config.json, in {path}: the model changed after it was attacked. Attack it again with "
                "--overwrite."
            )
        traces.append(trace)
    return traces


def control_traces(
    folder: Path, base_folder: Path, base: ModelFingerprint, table: Mapping[str, Attack], lowest: float = 0.0
) -> dict[str, list[AttackTrace]]:
    """Traces of control and what stands beside it, copied from the base's folder into ``folder``, which is then whole.

    Raises:
        IncompleteExamError: no control was attacked.
        RecordError: as in ``read_traces``.
    """
    found: dict[str, list[AttackTrace]] = {}
    for role in ("control", "scratch", "nothing", "alternative"):
        traces = read_traces(base_folder, role, base, table, lowest)
        for trace in traces:
            source = base_folder / "traces" / role / trace.file_name
            target = folder / "traces" / role / trace.file_name
            if not target.exists() or sha256_file(target) != sha256_file(source):
                atomic_write(target, source.read_bytes())
        found[role] = traces
    if not found["control"]:
        raise IncompleteExamError(
            f"expected attack traces of the base in {base_folder}/traces/control, got none: run hf-immunize attack "
            f"--model_path {base_folder} --role control with the options of the subject's attacks."
        )
    return found


def trace_hashes(folder: Path, traces: Mapping[str, Sequence[AttackTrace]]) -> dict[str, str]:
    """SHA-256 of each trace file by its path relative to ``folder``."""
    return {
        f"traces/{role}/{trace.file_name}": sha256_file(folder / "traces" / role / trace.file_name)
        for role, found in sorted(traces.items())
        for trace in found
    }
