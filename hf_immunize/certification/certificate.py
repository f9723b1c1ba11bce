"""Evidence in, certificate out: two model folders with their traces become one ``Certificate``."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from hf_immunize.attacks import ATTACKS, TRAINABILITY, describe_model, load_classifier
from hf_immunize.certification.cells import build_cell, own_threshold, reference_threshold
from hf_immunize.certification.checklist import lines_not_run
from hf_immunize.certification.evidence import control_traces, read_traces, trace_hashes
from hf_immunize.certification.protocol import Protocol
from hf_immunize.certification.trainability import measure_trainability
from hf_immunize.certification.utility import measure_utility
from hf_immunize.certification.verdict import family_verdicts, overall_verdict, statement
from hf_immunize.data import PixelDataset
from hf_immunize.errors import IncompleteExamError, ModelError, RecordError
from hf_immunize.features import find_classifier
from hf_immunize.metrics import immunization_ratio
from hf_immunize.records import (
    AttackTrace,
    Cell,
    Certificate,
    DatasetFingerprint,
    ModelFingerprint,
    Provenance,
    SpectrumRecord,
    loading_files,
)
from hf_immunize.spectra import model_spectra


@dataclass(frozen=True)
class ExamData:
    """Held-out data of both tasks and its fingerprints.

    ``primary_test`` judges utility; ``harmful_attack`` (never seen by the defender) and ``primary_test`` are the whole
    splits whose spectra are measured; ``harmful`` are the fingerprints of the attacker's three splits.
    """

    primary_test: PixelDataset
    harmful_attack: PixelDataset
    primary: tuple[DatasetFingerprint, ...]
    harmful: tuple[DatasetFingerprint, ...]
    benign: tuple[DatasetFingerprint, ...] = ()


def build_certificate(
    folder: str | Path,
    base_folder: str | Path,
    data: ExamData,
    protocol: Protocol,
    *,
    threshold: float | None = None,
    feature_module: str | None = None,
    device: str = "cpu",
) -> Certificate:
    """Judge the model in ``folder`` against its base. Control traces are copied into ``folder``.

    ``threshold`` is the harmful accuracy that counts as success; by default the protocol's share of its reference.

    Raises:
        IncompleteExamError: no base, no control traces, or a control that sat another exam.
        ModelError: a base of another architecture.
        RecordError: traces that are broken, of other weights, or of other data.
    """
    folder, base_folder, rule = Path(folder), Path(base_folder), protocol.rule
    _check_base(base_folder)
    base, immunized = load_classifier(base_folder), load_classifier(folder)
    control, subject = describe_model(base_folder, base), describe_model(folder, immunized)
    _check_comparable(control, subject)
    everything = {"subject": read_traces(folder, "subject", subject, ATTACKS | TRAINABILITY)}
    everything |= control_traces(folder, base_folder, control, ATTACKS | TRAINABILITY)
    traces, benign = (
        {role: [trace for trace in found if trace.attack in table] for role, found in everything.items()}
        for table in (ATTACKS, TRAINABILITY)
    )
    _check_data(traces, data.harmful, "harmful")
    _check_data(benign, data.benign, "benign")
    _check_base_held(traces)
    cells = _cells(traces, protocol, threshold, data.harmful[-1])
    trainability = measure_trainability(benign, rule)
    utility = measure_utility(base.to(device), immunized.to(device), data.primary_test, rule.level)
    spectra = {
        name: _spectra(model, data, feature_module) for name, model in (("base", base), ("immunized", immunized))
    }
    ratio, parts = immunization_ratio(spectra["base"], spectra["immunized"])
    return Certificate(
        protocol=protocol.name, planned=list(protocol.attacks),
        subject=subject, control=control, primary_data=list(data.primary), harmful_data=list(data.harmful),
        utility=utility, cells=cells, families=family_verdicts(cells),
        overall=overall_verdict(cells, utility, rule, trainability),
        statement=statement(cells, utility, rule, subject.name, trainability), rule=rule.in_words(),
        threshold_rule=rule.threshold_in_words() if threshold is None else "Given by hand.",
        spectra=spectra, immunization_ratio=ratio, immunization_ratio_parts=parts,
        not_run=lines_not_run(sum(everything.values(), []), protocol.attacks), files=loading_files(folder),
        benign_data=list(data.benign), trainability=trainability,
        traces=trace_hashes(folder, everything), provenance=Provenance.here(device), expires=_expiry(rule.valid_days),
    )


def _expiry(days: int) -> str:
    return (datetime.datetime.now(datetime.UTC).date() + datetime.timedelta(days=days)).isoformat()


def _check_base(folder: Path) -> None:
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
    traces: Mapping[str, Sequence[AttackTrace]], protocol: Protocol, given: float | None, test: DatasetFingerprint
) -> list[Cell]:
    """One cell for every attack that is planned or was run on any side; none can be left out."""
    rule = protocol.rule
    common = reference_threshold(traces["control"], rule) if given is None else given

    def threshold(name: str) -> float:
        if given is not None or not ATTACKS[name].own_threshold:
            return common
        control = [trace for trace in traces["control"] if trace.attack == name]
        own = own_threshold(control, 1 / max(len(test.classes), 1), rule)
        return common if own is None else own

    run = {trace.attack for found in traces.values() for trace in found}
    names = [name for name in ATTACKS if name in run or name in protocol.attacks]
    return [
        build_cell(
            name,
            ATTACKS[name],
            {role: [trace for trace in found if trace.attack == name] for role, found in traces.items()},
            threshold(name),
            test.rows,
            rule,
        )
        for name in names
    ]


def _spectra(model: nn.Module, data: ExamData, feature_module: str | None) -> list[SpectrumRecord]:
    site = feature_module or find_classifier(model)
    return model_spectra(model, site, {"harmful": data.harmful_attack, "primary": data.primary_test})


def _check_data(
    traces: Mapping[str, Sequence[AttackTrace]], splits: Sequence[DatasetFingerprint], task: str
) -> None:
    """Raise RecordError for a trace of other data than the exam's."""
    wanted = [fingerprint.sha256 for fingerprint in splits]
    for role, found in traces.items():
        for trace in found:
            if [fingerprint.sha256 for fingerprint in trace.data] != wanted:
                raise RecordError(
                    f"expected traces on the {task} splits of this exam, got other rows in {role}/{trace.file_name}: "
                    "certify with the task options (dataset, labels, splits, split_seed) the attacks were run with."
                )


def _check_base_held(traces: Mapping[str, Sequence[AttackTrace]]) -> None:
    """Raise IncompleteExamError where the sides were given different bases: a wrong one weakens the attack."""
    held = {role: {trace.config.get("base") for trace in found if ATTACKS[trace.attack].needs == ("base",)}
            for role, found in traces.items() if role != "scratch"}
    if len(set().union(*held.values())) > 1:
        raise IncompleteExamError(
            "expected attackers of subject and control to hold the same base, got different ones: run "
            "recipes/attack.py with the same --base_path on both."
        )
