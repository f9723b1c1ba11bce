"""Fine-tune one diffusion pipeline on a concept, as an attacker would, and leave one trace file per run.

    accelerate launch recipes/attack_diffusion.py --config recipes/mnist-diffusion/smoke/task.yaml \
        --config recipes/mnist-diffusion/smoke/attack.yaml --model_path runs/mnist-diffusion-smoke/base --role control
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from hf_immunize.attacks import count_runs, parse_settings, plan_runs, run_suite
from hf_immunize.attacks.diffusion import DIFFUSION_ATTACKS, DIFFUSION_TRAINABILITY, DiffusionAttackContext
from hf_immunize.attacks.plan import find_attack
from hf_immunize.certification import find_protocol
from hf_immunize.certification.protocol import DIFFUSION_PROTOCOLS
from hf_immunize.diffusion.prompts import PromptTask
from hf_immunize.diffusion.tasks import ConceptArguments, ConceptTask
from hf_immunize.errors import ConfigError, ImmunizeError
from hf_immunize.options import parse_options


@dataclass
class AttackArguments:
    """Which pipeline is attacked, with which concept, by whom, and how often."""

    model_path: str = field(metadata={"help": "Folder of the pipeline to attack."})
    role: str = field(default="subject", metadata={"help": "subject, control (the base) or scratch (random weights)."})
    concept: str = field(
        default="harmful",
        metadata={"help": "harmful, or benign: whether a concept nobody minds is still as easy to learn."},
    )
    attacks: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Among {', '.join(DIFFUSION_ATTACKS)}; for benign among {', '.join(DIFFUSION_TRAINABILITY)}. "
            "All of the protocol by default."
        },
    )
    protocol: str = field(
        default="diffusion_quick", metadata={"help": f"Preset exam: {', '.join(DIFFUSION_PROTOCOLS)}."}
    )
    trials: int | None = field(
        default=None, metadata={"help": "Random search of so many trials; 0 = the grid. The protocol's by default."}
    )
    tuning_seeds: int | None = field(
        default=None,
        metadata={
            "help": "Compare such trials on this many seeds and run the best (fastest, furthest) on the others; 0 = "
            "every trial on every seed. The protocol's by default."
        },
    )
    exam_levels: int = field(
        default=8, metadata={"help": "Noise levels that every held-out image is judged at; the same for every model."}
    )
    eval_batch_size: int = field(
        default=256, metadata={"help": "Rows at a time in the exam and when images are drawn."}
    )
    pictures: int = field(
        default=8, metadata={"help": "Images of the concept that an attacked model draws; 0 for none."}
    )
    seeds: list[int] | None = field(
        default=None, metadata={"help": "Seeds of rows, noise and adapters; the protocol's by default."}
    )
    settings: list[str] | None = field(
        default=None, metadata={"help": "attack.field=value[,value...], e.g. diffusion_lora.learning_rate=1e-3,1e-2"}
    )
    attack_fraction: float = field(default=0.8, metadata={"help": "Share of the attack split one seed trains on."})
    output_path: str | None = field(
        default=None,
        metadata={"help": "Where traces/<role>/ and samples/<role>/ are written; model_path by default."},
    )
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda or mps."})
    overwrite: bool = field(default=False, metadata={"help": "Make runs again whose trace tells of another run."})


def start(device: str) -> PartialState:
    """The process on the device that was asked for."""
    known = {"auto": True, "cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not known.get(device, False):
        there = [name for name, usable in known.items() if usable]
        raise ConfigError(f"expected device among {there} on this machine, got {device!r}.")
    return PartialState(cpu=device == "cpu")


def attack(task: ConceptTask | PromptTask, options: AttackArguments) -> None:
    """Run what is planned and not on disk yet, and say what was done."""
    state = start(options.device)
    if state.num_processes > 1:
        raise ConfigError(f"expected one process, got {state.num_processes}: attack several models side by side.")
    if options.concept not in ("harmful", "benign"):
        raise ConfigError(f"expected concept 'harmful' or 'benign', got {options.concept!r}.")
    splits = {name: task.examples(options.concept, name) for name in ("attack", "validation", "test")}
    context = DiffusionAttackContext(
        folder=Path(options.model_path), role=options.role, **splits,
        data=tuple(
            held.fingerprint(source=task.source, role=f"{options.concept} {name}") for name, held in splits.items()
        ),
        device=str(state.device), attack_fraction=options.attack_fraction, exam_levels=options.exam_levels,
        eval_batch_size=options.eval_batch_size, pictures=options.pictures, **task.attacker_knows(options.concept),
    )
    protocol, benign = find_protocol(options.protocol, DIFFUSION_PROTOCOLS), options.concept == "benign"
    table = DIFFUSION_TRAINABILITY if benign else DIFFUSION_ATTACKS
    names = options.attacks or list(protocol.trainability if benign else protocol.attacks)
    settings = parse_settings(
        [*(protocol.benign_settings() if benign else protocol.settings), *(options.settings or [])], table
    )
    seeds = options.seeds or list(protocol.seeds)
    trials = (protocol.trials if options.trials is None else options.trials) or None
    tuning = (protocol.tuning_seeds if options.tuning_seeds is None else options.tuning_seeds) or None
    planned = 0
    for name in names:
        entry = find_attack(name, table)
        planned += count_runs(entry, plan_runs(entry, seeds, settings.get(name), trials), seeds, tuning)
    output = Path(options.output_path or options.model_path)
    with tqdm(total=planned, desc=f"attacks on {output.name} ({options.role})", unit="run", disable=None) as bar:

        def progress(trace, made):
            bar.total = max(bar.total, bar.n + 1)  # a second finalist was not planned
            bar.update()

        summary = run_suite(
            context, table, names, seeds, output, settings, trials=trials, tuning_seeds=tuning,
            overwrite=options.overwrite, progress=progress,
        )
    print(
        f"{output / 'traces' / options.role}: {summary.made} runs made, {summary.kept} kept from before, "
        f"{summary.diverged} diverged (failed tries of the attacker)."
    )


def main() -> None:
    task_options, options = parse_options((ConceptArguments, AttackArguments), description=__doc__.splitlines()[0])
    attack(ConceptTask(task_options), options)


if __name__ == "__main__":
    try:
        main()
    except ImmunizeError as error:
        sys.exit(f"{type(error).__name__}: {error}")
