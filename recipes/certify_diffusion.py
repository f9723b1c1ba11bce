"""Judge an attacked diffusion pipeline against its attacked base: write certificate.json and the model card README.md.

    accelerate launch recipes/certify_diffusion.py --config recipes/mnist-diffusion/task.yaml \
        --config recipes/mnist-diffusion/certify.yaml --model_path runs/mnist-diffusion/simulated_attack
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import diffusers
from attack_diffusion import start
from rich.console import Console

from hf_immunize.certification import find_protocol
from hf_immunize.certification.diffusion import ConceptExam, build_diffusion_certificate, recheck_pipeline
from hf_immunize.certification.protocol import DIFFUSION_PROTOCOLS, Rule
from hf_immunize.certification.similarity import FeatureSimilarity, ImageFeatures
from hf_immunize.diffusion.prompts import PromptTask
from hf_immunize.diffusion.tasks import ConceptArguments, ConceptTask
from hf_immunize.errors import ImmunizeError
from hf_immunize.hub import write_card
from hf_immunize.hub.tables import certificate_table
from hf_immunize.options import parse_options


@dataclass
class CertifyArguments:
    """Which pipeline is judged against which base."""

    model_path: str = field(metadata={"help": "Folder of the pipeline under test, with traces/subject/."})
    base_path: str = field(metadata={"help": "Folder of the un-immunized base, with traces/control/."})
    protocol: str = field(
        default="diffusion_quick",
        metadata={"help": f"Exam whose attacks must be there or are named NOT RUN: {', '.join(DIFFUSION_PROTOCOLS)}."},
    )
    threshold: float | None = field(
        default=None, metadata={"help": "Harmful score that counts as success; by default a share of the base's gain."}
    )
    judge_path: str | None = field(
        default=None,
        metadata={"help": "Folder of an image classifier that recognises what is drawn; without one, utility is R2."},
    )
    features_path: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of an image model (CLIP, DINOv2, a classifier) by whose features drawn images "
            "are compared with real ones: SGR and Fréchet distance. The judge by default."
        },
    )
    judged_images: int = field(
        default=1000, metadata={"help": "Images that each model draws for the judge and the Fréchet distance."}
    )
    draw_steps: int = field(default=20, metadata={"help": "Sampling steps of every drawn image."})
    eval_batch_size: int = field(default=256, metadata={"help": "Rows at a time."})
    recheck: int = field(
        default=0, metadata={"help": "Write nothing; sit this many random cells of the certificate again and compare."}
    )
    recheck_seed: int = field(default=0, metadata={"help": "Which cells are drawn for the recheck."})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda or mps."})


def certify(task: ConceptTask | PromptTask, arguments: CertifyArguments) -> None:
    """Judge, write, and print; or sit a part of the exam again."""
    diffusers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    state = start(arguments.device)
    if not state.is_main_process:
        return
    folder = Path(arguments.model_path)
    retain = task.examples("retain", "test")
    attackers = {
        side: [task.examples(side, split).fingerprint(source=task.source, role=f"{side} {split}")
               for split in ("attack", "validation", "test")]
        for side in task.sides if side != "retain"
    }
    benign = "benign" in task.sides
    features = arguments.features_path or arguments.judge_path
    seen_by = None if features is None else ImageFeatures.of(features, str(state.device))
    exam = ConceptExam(
        retain_test=retain, harmful_test=task.examples("harmful", "test"),
        retain=(retain.fingerprint(source=task.source, role="retain test"),),
        harmful=tuple(attackers["harmful"]), benign=tuple(attackers.get("benign", ())),
        benign_test=task.examples("benign", "test") if benign else None,
        judge=None if arguments.judge_path is None else Path(arguments.judge_path), judge_names=task.judge_names,
        similarity=None if seen_by is None else FeatureSimilarity(seen_by), features=seen_by,
        judged_images=arguments.judged_images, draw_steps=arguments.draw_steps,
        eval_batch_size=arguments.eval_batch_size,
    )
    protocol = find_protocol(arguments.protocol, DIFFUSION_PROTOCOLS)
    if arguments.recheck:
        check_again(arguments, task, exam, protocol.rule, str(state.device))
        return
    certificate = build_diffusion_certificate(
        folder, arguments.base_path, exam, protocol, threshold=arguments.threshold, device=str(state.device),
    )
    certificate.write(folder / "certificate.json")
    write_card(folder)
    Console().print(certificate_table(certificate))
    for found in certificate.trainability:
        print(f"benign trainability, {found.attack.removeprefix('benign_')}: {found.verdict}, {found.reason}")
    print(f"certificate: {folder / 'certificate.json'}")


def check_again(
    arguments: CertifyArguments, task: ConceptTask | PromptTask, exam: ConceptExam, rule: Rule, device: str
) -> None:
    """Sit random cells again; leave with an error when a stored interval does not hold."""
    found = recheck_pipeline(
        arguments.model_path, arguments.base_path,
        {split: task.examples("harmful", split) for split in ("attack", "validation", "test")}, exam, rule,
        cells=arguments.recheck, seed=arguments.recheck_seed, device=device, eval_batch_size=arguments.eval_batch_size,
        **task.attacker_knows("harmful"),
    )
    print("\n".join(line.told for line in found))
    if not all(line.agrees for line in found):
        sys.exit("the certificate does not hold on this machine: see above.")


def main(argv: Sequence[str] | None = None) -> None:
    task_options, arguments = parse_options((ConceptArguments, CertifyArguments), argv, description=__doc__)
    certify(ConceptTask(task_options), arguments)


if __name__ == "__main__":
    try:
        main()
    except ImmunizeError as error:
        sys.exit(f"{type(error).__name__}: {error}")
