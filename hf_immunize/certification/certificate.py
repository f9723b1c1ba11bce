"""Evidence in, certificate out: two model folders with their traces become one ``Certificate``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from hf_immunize.attacks import ATTACKS, REFERENCES, TRAINABILITY, describe_model
from hf_immunize.certification.judge import Evidence, judge_traces
from hf_immunize.certification.judgement import Sides, check_base, gather
from hf_immunize.certification.primary_rows import judge_utility, keep_rows
from hf_immunize.certification.utility import utility_rows
from hf_immunize.data import PixelDataset
from hf_immunize.exam import Protocol
from hf_immunize.features import find_classifier
from hf_immunize.models import load_classifier, load_on_base
from hf_immunize.records import Certificate, DatasetFingerprint, Provenance, SpectrumRecord
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
    task: Mapping[str, Any] = field(default_factory=dict)
    """Options that decide the rows, for whoever sits the exam again."""


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

    A PEFT adapter in ``folder`` is judged as what it makes of ``base_folder``.
    ``threshold`` is the harmful accuracy that counts as success; by default the protocol's share of its reference.

    Raises:
        IncompleteExamError: no base, no control traces, or a control that sat another exam.
        ModelError: a base of another architecture.
        RecordError: traces that are broken, of other weights, or of other data.
    """
    folder, base_folder, rule = Path(folder), Path(base_folder), protocol.rule
    check_base(base_folder)
    base, immunized = load_classifier(base_folder), load_on_base(folder, base_folder)
    sides = Sides(folder, base_folder, describe_model(folder, immunized), describe_model(base_folder, base))
    found = gather(sides, ATTACKS, TRAINABILITY, protocol, threshold, REFERENCES)
    answers = utility_rows(
        base.to(device), immunized.to(device), data.primary_test, data.primary[0].sha256, sides.subject, sides.control
    )
    evidence = Evidence(
        **found.evidence, primary_data=data.primary, harmful_data=data.harmful, benign_data=data.benign,
        task=data.task,
        utility=judge_utility(answers, rule.level), utility_rows=keep_rows(folder, [answers]),
        spectra={
            name: _spectra(model, data, feature_module) for name, model in (("base", base), ("immunized", immunized))
        },
        provenance=Provenance.here(device),
    )  # fmt: skip
    return judge_traces(found.by_role, found.plan, rule, evidence)


def _spectra(model: nn.Module, data: ExamData, feature_module: str | None) -> list[SpectrumRecord]:
    site = feature_module or find_classifier(model)
    return model_spectra(model, site, {"harmful": data.harmful_attack, "primary": data.primary_test})
