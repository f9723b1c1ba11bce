"""Fine-tune one diffusion pipeline on a concept, as an attacker would, and leave one trace file per run.

    accelerate launch recipes/attack_diffusion.py --config recipes/mnist-diffusion/smoke/task.yaml \
        --config recipes/mnist-diffusion/smoke/attack.yaml --model_path runs/mnist-diffusion-smoke/base --role control
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from tqdm.auto import tqdm

from hf_immunize.attacks import parse_settings, plan_runs, run_suite
from hf_immunize.attacks.diffusion import DIFFUSION_ATTACKS, DiffusionAttackContext
from hf_immunize.attacks.plan import find_attack
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
    attacks: list[str] = field(
        default_factory=lambda: list(DIFFUSION_ATTACKS), metadata={"help": f"Among {', '.join(DIFFUSION_ATTACKS)}."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of rows, noise and adapters."})
    settings: list[str] | None = field(
        default=None, metadata={"help": "attack.field=value[,value...], e.g. diffusion_lora.learning_rate=1e-3,1e-2"}
    )
    attack_fraction: float = field(default=0.8, metadata={"help": "Share of the attack split one seed trains on."})
    output_path: str | None = field(
        default=None,
        metadata={"help": "Where traces/<role>/ is written; model_path by default, model_path/benign for benign."},
    )
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda or mps."})
    overwrite: bool = field(default=False, metadata={"help": "Make runs again whose trace tells of another run."})


def main() -> None:
    task_options, options = parse_options((ConceptArguments, AttackArguments), description=__doc__.splitlines()[0])
    state = PartialState(cpu=options.device == "cpu")
    if state.num_processes > 1:
        raise ConfigError(f"expected one process, got {state.num_processes}: attack several models side by side.")
    if options.concept not in ("harmful", "benign"):
        raise ConfigError(f"expected concept 'harmful' or 'benign', got {options.concept!r}.")
    task = ConceptTask(task_options)
    splits = {name: task.examples(options.concept, name) for name in ("attack", "validation", "test")}
    context = DiffusionAttackContext(
        folder=Path(options.model_path), role=options.role, **splits,
        data=tuple(
            held.fingerprint(source=task.source, role=f"{options.concept} {name}") for name, held in splits.items()
        ),
        device=str(state.device), attack_fraction=options.attack_fraction,
    )
    settings = parse_settings(options.settings or [], DIFFUSION_ATTACKS)
    planned = sum(
        len(plan_runs(find_attack(name, DIFFUSION_ATTACKS), options.seeds, settings.get(name)))
        for name in options.attacks
    )
    output = Path(options.output_path or options.model_path)
    if options.output_path is None and options.concept == "benign":
        output = output / "benign"
    with tqdm(total=planned, desc=f"attacks on {output.name} ({options.role})", unit="run", disable=None) as bar:
        summary = run_suite(
            context, DIFFUSION_ATTACKS, options.attacks, options.seeds, output, settings, overwrite=options.overwrite,
            progress=lambda trace, made: bar.update(),
        )
    print(
        f"{output / 'traces' / options.role}: {summary.made} runs made, {summary.kept} kept from before, "
        f"{summary.diverged} diverged (failed tries of the attacker)."
    )


if __name__ == "__main__":
    try:
        main()
    except ImmunizeError as error:
        sys.exit(f"{type(error).__name__}: {error}")
