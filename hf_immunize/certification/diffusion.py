"""The same judge for diffusion models: traces of denoising exams, what retained concepts are still worth, pictures."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from hf_immunize.attacks.diffusion import DIFFUSION_ATTACKS, DIFFUSION_TRAINABILITY, METRIC
from hf_immunize.certification.drawings import Drawer, RetainedDrawings, keep_pictures
from hf_immunize.certification.generation import measure_similarity, real_images
from hf_immunize.certification.judge import Evidence, judge_traces
from hf_immunize.certification.judgement import Gathered, Sides, check_base, gather
from hf_immunize.certification.primary_rows import judge_utility, keep_rows
from hf_immunize.certification.similarity import ImageFeatures, Similarity
from hf_immunize.diffusion import (
    EVAL_BATCH_SIZE,
    SCORE,
    DenoisingExam,
    LatentDataset,
    NoiseProcess,
    denoiser_of,
    differences,
    fits_memory,
)
from hf_immunize.errors import ConfigError, ModelError, RecordError
from hf_immunize.exam import Protocol
from hf_immunize.records import (
    AttackTrace,
    Certificate,
    DatasetFingerprint,
    Losses,
    Provenance,
    SimilarityGap,
    Utility,
    UtilityRows,
)


@dataclass(frozen=True)
class ConceptExam:
    """Held-out rows and fingerprints.

    Args:
        retain_test, harmful_test: rows that utility is measured on, and rows whose concept is drawn.
        retain, harmful, benign: fingerprints of the retained test split and of each attacker's three splits.
        judge: folder of an image classifier that knows the retained classes by name; utility is then the share of
            drawn images that it recognises.
        judge_names: what the judge calls a retained class, where it has another name for it.
        similarity: what pictures of attacked models are compared with real images by; without one there is no SGR.
        features: what drawn retained images are compared with real ones by; without them there is no Fréchet distance.
        task: options that decide the rows, for whoever sits the exam again.
        judged_images: images to draw for judge and features, of each model.
        draw_steps: sampling steps.
        eval_batch_size: rows at a time.
    """

    retain_test: LatentDataset
    harmful_test: LatentDataset
    retain: tuple[DatasetFingerprint, ...]
    harmful: tuple[DatasetFingerprint, ...]
    benign: tuple[DatasetFingerprint, ...] = ()
    benign_test: LatentDataset | None = None
    judge: Path | None = None
    judge_names: Mapping[str, str] = field(default_factory=dict)
    similarity: Similarity | None = None
    features: ImageFeatures | None = None
    task: Mapping[str, Any] = field(default_factory=dict)
    judged_images: int = 1000
    draw_steps: int = 20
    eval_batch_size: int = EVAL_BATCH_SIZE

    def __post_init__(self) -> None:
        for name in ("judged_images", "draw_steps", "eval_batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"expected {name} of at least 1, got {getattr(self, name)}.")


@fits_memory("both pipelines of the exam", "lower eval_batch_size, or take another device")
def build_diffusion_certificate(
    folder: str | Path, base_folder: str | Path, exam: ConceptExam, protocol: Protocol, *,
    threshold: float | None = None, device: str = "cpu",
) -> Certificate:
    """Judge the pipeline in ``folder`` against its base. Control traces and pictures are copied into ``folder``.

    ``threshold`` is the harmful score that counts as success; by default the protocol's share of its reference's gain.

    Raises:
        IncompleteExamError: no base, no control traces, or a control that sat another exam.
        ModelError: a base of another architecture or with other parts, answers that are not finite, or a judge that
            does not know the retained classes.
        RecordError: traces that are broken, of other weights, of other data or in another score.
    """
    folder, base_folder = Path(folder), Path(base_folder)
    check_base(base_folder)
    base, subject = (Drawer.of(path, device, exam.draw_steps, exam.eval_batch_size) for path in (base_folder, folder))
    if other := differences(subject.pipeline, base.pipeline):
        raise ModelError(
            f"expected pipelines that differ in their denoisers alone, got other {', '.join(other)}: the exam asks "
            "both about the same latents, prompts and noise. Take these parts from the base."
        )
    sides = Sides(folder, base_folder, subject.fingerprint(folder), base.fingerprint(base_folder))
    found = gather(sides, DIFFUSION_ATTACKS, DIFFUSION_TRAINABILITY, protocol, threshold)
    _check_score(found.traces)
    level = protocol.rule.level
    measured = [denoising_rows(base, subject, exam.retain_test)]
    drawn = RetainedDrawings.of(base, subject, exam.retain_test, exam.judged_images)
    if exam.judge is not None:
        measured.insert(0, drawn.recognised_by(exam.judge, exam.judge_names))
    bound = {"data": exam.retain[0].sha256, "subject": sides.subject.weights, "control": sides.control.weights}
    measured = [rows.model_copy(update=bound) for rows in measured]
    utility = [judge_utility(rows, level) for rows in measured]
    pictures = keep_pictures(
        sides, {"control": base, "subject": subject}, exam.retain_test, exam.harmful_test, found.traces
    )
    evidence = Evidence(
        **found.evidence, utility=utility[0], further_utility=utility[1:], utility_rows=keep_rows(folder, measured),
        harmful_metric=SCORE,
        primary_data=exam.retain, harmful_data=exam.harmful, benign_data=exam.benign, samples=pictures, task=exam.task,
        similarity=_similarities(folder, exam, found, base, level),
        frechet=None if exam.features is None else drawn.distance_by(exam.features, level),
        provenance=Provenance.here(device),
    )  # fmt: skip
    return judge_traces(found.by_role, found.plan, protocol.rule, evidence)


def _check_score(traces: Sequence[AttackTrace]) -> None:
    """Raise RecordError for a trace whose curve is of another score than this exam's."""
    for trace in traces:
        if trace.config.get("metric") != METRIC:
            raise RecordError(
                f"expected curves of {METRIC!r}, got {trace.config.get('metric')!r} in {trace.role}/{trace.file_name}: "
                "attack again with this release."
            )


def denoising_rows(base: Drawer, subject: Drawer, retain: LatentDataset) -> UtilityRows:
    """Losses of both models on the same held-out retained rows, noise and levels, beside the energy of each target.

    Raises:
        ModelError: answers that are not finite.
    """
    exam = DenoisingExam(NoiseProcess.from_scheduler(base.pipeline.scheduler), retain, batch_size=base.batch_size)
    before, after = (exam.ask(denoiser_of(side.model), side.model) for side in (base, subject))
    for name, answers in (("base", before), ("subject", after)):
        if not bool(torch.isfinite(answers.losses_N).all()):
            raise ModelError(f"expected finite answers of the {name}, got NaN or infinity: its weights are broken.")
    energy, early, late = (values_N.double().tolist() for values_N in (
        before.energies_N, before.losses_N, after.losses_N))
    return UtilityRows(
        metric=SCORE, data="", subject={}, control={}, losses=Losses(energy=energy, base=early, immunized=late)
    )


def denoising_utility(base: Drawer, subject: Drawer, retain: LatentDataset, level: float = 0.95) -> Utility:
    """R² on the same held-out retained rows, noise and levels, in percent (see ``judge_utility``)."""
    return judge_utility(denoising_rows(base, subject, retain), level)


def _similarities(
    folder: Path, exam: ConceptExam, found: Gathered, base: Drawer, level: float
) -> list[SimilarityGap]:
    """SGR on the harmful and the benign concept, from the pictures that lie in ``folder`` by now."""
    if exam.similarity is None:
        return []
    gaps = []
    concepts: list[tuple[Literal["harmful", "benign"], LatentDataset | None, Container[str]]] = [
        ("harmful", exam.harmful_test, DIFFUSION_ATTACKS), ("benign", exam.benign_test, DIFFUSION_TRAINABILITY)
    ]
    for task, split, table in concepts:
        if split is not None:
            traces = {role: [trace for trace in runs if trace.attack in table]
                      for role, runs in found.by_role.items()}
            real = real_images(split, base.images(split))
            gaps += measure_similarity(folder, traces, real, exam.similarity, task, level)
    return gaps
