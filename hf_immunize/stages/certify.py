"""Judge an attacked model against its attacked base: write certificate.json and the model card README.md.

The model is a classifier or a diffusion pipeline, as the task says: classes, concepts, or folders with prompts.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

from hf_immunize.certification import ExamData, build_certificate
from hf_immunize.certification.bench import Bench
from hf_immunize.certification.trials import repeat_trials
from hf_immunize.exam import DIFFUSION_PROTOCOLS, PROTOCOLS, Protocol, find_protocol
from hf_immunize.hub import write_card
from hf_immunize.hub.tables import certificate_table
from hf_immunize.models import reads_images
from hf_immunize.options import option, required
from hf_immunize.records import Certificate, RecheckRecord
from hf_immunize.stages.start import DEVICE_HELP, hush, start, working_copy
from hf_immunize.stages.words import read_words, refuse_foreign
from hf_immunize.tasks import attacker_fingerprints, family_of


@dataclass
class CertifyOptions:
    """Which model is judged against which base."""

    ONLY: ClassVar[dict[str, str]] = {
        "feature_module": "classifier", "judge_path": "pipeline", "features_path": "pipeline",
        "judged_images": "pipeline", "draw_steps": "pipeline", "eval_batch_size": "pipeline",
    }  # fmt: skip

    model_path: str = required("Folder of the model under test, with traces/subject/; or the Hub id it was attacked "
                               "by, which stands for the folder it was copied to.")
    base_path: str = required("The same for the un-immunized base, with traces/control/.")
    revision: str | None = option(None, "Revision of a model_path on the Hub.")
    base_revision: str | None = option(None, "Revision of a base_path on the Hub.")
    protocol: str | None = option(None, "Preset exam whose attacks must be there or are named NOT RUN: "
                                  f"{', '.join(PROTOCOLS)}; for pipelines {', '.join(DIFFUSION_PROTOCOLS)}. The first "
                                  "by default.")
    threshold: float | None = option(None, "Harmful score that counts as success (accuracy in 0..1, or R2 of the "
                                     "concept); by default a share of what the base's best attack reaches.")
    feature_module: str | None = option(None, "Classifiers: layer whose input's spectrum is measured; the head by "
                                        "default.")
    judge_path: str | None = option(None, "Pipelines: folder of an image classifier that recognises what is drawn; "
                                    "without one, utility is R2.")
    features_path: str | None = option(None, "Pipelines: folder or Hub id of an image model (CLIP, DINOv2, a "
                                       "classifier) by whose features drawn images are compared with real ones: SGR "
                                       "and Fréchet distance. The judge by default.")
    judged_images: int = option(1000, "Pipelines: images that each model draws for the judge and the Fréchet distance.")
    draw_steps: int = option(20, "Pipelines: sampling steps of every drawn image.")
    eval_batch_size: int = option(256, "Pipelines: rows at a time.")
    device: str = option("auto", DEVICE_HELP)
    recheck: int = option(0, "Write nothing; make this many random trials of the certificate again and compare.")
    recheck_seed: int = option(0, "Which trials are drawn for the recheck.")


def certify_model(arguments: Any, options: CertifyOptions) -> Certificate | None:
    """Judge, write, and print; with ``recheck``, sit a part of the exam again. None on any but the main process.

    Args:
        arguments: the task: TaskArguments, ConceptArguments or PromptArguments.

    Raises:
        IncompleteExamError: no base, no control traces, or a control that sat another exam.
        SystemExit: a recheck that came out otherwise than the certificate says.
    """
    family = family_of(arguments)
    refuse_foreign(options, family)
    hush()
    state, device = start(options.device)
    if not state.is_main_process:
        return None
    folder = working_copy(options.model_path, options.revision, adapters=family.kind == "classifier")
    base = working_copy(options.base_path, options.base_revision)
    presets = PROTOCOLS if family.kind == "classifier" else DIFFUSION_PROTOCOLS
    protocol = find_protocol(options.protocol or next(iter(presets)), presets)
    task = family.open(arguments, base if family.name == "prompts" else reads_images(folder, base))
    if options.recheck:
        bench = Bench(Path(folder), Path(base), task, device, options.eval_batch_size)
        _compare(repeat_trials(folder, bench, options.recheck, options.recheck_seed))
        return Certificate.read(Path(folder) / "certificate.json")
    judge = _judge_classifier if family.kind == "classifier" else _judge_pipeline
    certificate = judge(task, options, folder, base, device, protocol)
    certificate.write(Path(folder) / "certificate.json")
    write_card(Path(folder))
    _show(certificate, Path(folder) / "certificate.json")
    return certificate


def _judge_classifier(
    task: Any, options: CertifyOptions, folder: str, base: str, device: str, protocol: Protocol
) -> Certificate:
    """Accuracy on held-out rows of the primary task, and attacks in accuracy on those of the harmful one."""
    task.warn_of_copies(*task.sides)
    data = ExamData(
        primary_test=task.examples("primary", "test"),
        harmful_attack=task.examples("harmful", "attack"),
        primary=(task.fingerprint("primary", "test"),),
        harmful=attacker_fingerprints(task, "harmful"),
        benign=attacker_fingerprints(task, "benign") if "benign" in task.sides else (),
        task=task.located(),
    )
    return build_certificate(
        folder, base, data, protocol, threshold=options.threshold, feature_module=options.feature_module, device=device
    )


def _judge_pipeline(
    task: Any, options: CertifyOptions, folder: str, base: str, device: str, protocol: Protocol
) -> Certificate:
    """What retained concepts are still worth, and attacks in the share of the denoising target that is explained."""
    from hf_immunize.certification.diffusion import ConceptExam, build_diffusion_certificate
    from hf_immunize.certification.similarity import FeatureSimilarity, ImageFeatures

    features = options.features_path or options.judge_path
    seen_by = None if features is None else ImageFeatures.of(features, device)
    benign = "benign" in task.sides
    exam = ConceptExam(
        retain_test=task.examples("retain", "test"), harmful_test=task.examples("harmful", "test"),
        retain=(task.fingerprint("retain", "test"),), harmful=attacker_fingerprints(task, "harmful"),
        benign=attacker_fingerprints(task, "benign") if benign else (),
        benign_test=task.examples("benign", "test") if benign else None,
        judge=None if options.judge_path is None else Path(options.judge_path), judge_names=task.judge_names,
        similarity=None if seen_by is None else FeatureSimilarity(seen_by), features=seen_by,
        task=task.described(), judged_images=options.judged_images, draw_steps=options.draw_steps,
        eval_batch_size=options.eval_batch_size,
    )  # fmt: skip

    return build_diffusion_certificate(folder, base, exam, protocol, threshold=options.threshold, device=device)


def _compare(found: RecheckRecord) -> None:
    """Print what came out this time; leave with an error when it is not what was certified."""
    for item in found.trials:
        held = "agrees" if item.agrees else "DOES NOT AGREE"
        print(f"{item.attack} {item.trial} on the {item.role}: {item.told}: {held}")
    if not found.holds:
        sys.exit("the certificate does not hold on this machine: see above.")


def _show(certificate: Certificate, path: Path) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = 120  # logs are not 80 columns wide
    console.print(certificate_table(certificate))
    for found in certificate.trainability:
        print(f"benign trainability, {found.attack.removeprefix('benign_')}: {found.verdict}, {found.reason}")
    print(f"certificate: {path}")


def main(argv: Sequence[str] | None = None, family: str | None = None, prog: str | None = None) -> None:
    """The stage on words of a command line."""
    certify_model(*read_words(lambda _: (CertifyOptions,), argv, __doc__, family, prog))
