"""Attack one model with the harmful task and leave one trace file per run.

    accelerate launch recipes/attack.py --config recipes/digits-vit/attack.yaml \
        --model_path runs/digits-vit/base --role control
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
import transformers
from accelerate import PartialState
from tqdm.auto import tqdm

from hf_immunize.attacks import (
    ATTACKS,
    TRAINABILITY,
    AttackContext,
    count_runs,
    parse_settings,
    plan_runs,
    run_suite,
)
from hf_immunize.attacks.plan import describe_attacks, find_attack
from hf_immunize.certification.protocol import PROTOCOLS, Protocol, find_protocol
from hf_immunize.data import Task, TaskArguments
from hf_immunize.errors import ConfigError, ImmunizeError
from hf_immunize.hub import local_folder, working_folder
from hf_immunize.models import load_processor
from hf_immunize.options import parse_options


@dataclass
class AttackArguments:
    """Which model is attacked, by whom, and how often."""

    model_path: str = field(metadata={"help": "Folder (save_pretrained) or Hub id of the model to attack."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a model on the Hub."})
    role: str = field(
        default="subject",
        metadata={
            "help": "subject: the model under test. control: its un-immunized base. scratch: random weights with the "
            "architecture of model_path."
        },
    )
    protocol: str = field(
        default="quick", metadata={"help": f"Preset of attacks, sweeps and seeds: {', '.join(PROTOCOLS)}."}
    )
    attacks: list[str] | None = field(
        default=None, metadata={"help": f"Attacks to run, all of the protocol by default. Known: {', '.join(ATTACKS)}."}
    )
    seeds: list[int] | None = field(
        default=None, metadata={"help": "Seeds of the attacker's rows, initialisation and data order."}
    )
    settings: list[str] | None = field(
        default=None,
        metadata={
            "help": "Replace an attack's hyperparameters: attack.field=value[,value...]; several values are a sweep, "
            "e.g. lora.learning_rate=1e-3,1e-2 lora.rank=4. --describe lists all fields and their values."
        },
    )
    trials: int | None = field(
        default=None,
        metadata={
            "help": "Random search instead of the grid: this many trials of every attack that trains the network, the "
            "same for every model; 0 = the grid. The protocol's by default."
        },
    )
    tuning_seeds: int | None = field(
        default=None,
        metadata={
            "help": "Compare such trials on this many seeds and run the best (fastest, furthest) on the others; 0 = "
            "every trial on every seed. The protocol's by default."
        },
    )
    task: str = field(
        default="harmful",
        metadata={"help": "harmful: attack. benign: learn benign_dataset, which a good immunization does not hinder."},
    )
    base_path: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the base, where the attackers of this exam hold it too (it is public): attacks that "
            "compare with it then run. Give it for every role or for none."
        },
    )
    attack_fraction: float = field(
        default=0.8, metadata={"help": "Share of each class of the attack split that one seed trains on."}
    )
    feature_module: str | None = field(
        default=None, metadata={"help": "Head whose input is probed; found automatically by default."}
    )
    output_path: str | None = field(
        default=None,
        metadata={
            "help": "Where traces/<role>/ is written; model_path by default. A model from the Hub is copied there, by "
            "default to runs/<owner>--<name>, so that certify.py finds weights and traces together."
        },
    )
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda or mps."})
    overwrite: bool = field(default=False, metadata={"help": "Make runs again whose trace tells of another run."})
    describe: bool = field(default=False, metadata={"help": "List every attack with its fields and values, and stop."})


def main(argv: Sequence[str] | None = None) -> None:
    """Run the attacks that are missing."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "--describe" in words:
        print(describe_attacks(ATTACKS | TRAINABILITY))
        return
    task_arguments, arguments = parse_options((TaskArguments, AttackArguments), words, description=__doc__)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.simplefilter("ignore", FutureWarning)  # the libraries' own, about each other
    state = PartialState(cpu=arguments.device == "cpu")
    if state.num_processes > 1:
        raise ConfigError(
            f"expected one process, got {state.num_processes}: runs are independent, so launch with --num_processes 1 "
            "and attack several models side by side instead."
        )
    torch.set_float32_matmul_precision("highest")
    protocol = find_protocol(arguments.protocol)
    table, presets, planned_names = choose_table(arguments.task, protocol)
    names = arguments.attacks or list(planned_names)
    seeds = arguments.seeds or list(protocol.seeds)
    settings = parse_settings([*presets, *(arguments.settings or [])], table)
    trials = (protocol.trials if arguments.trials is None else arguments.trials) or None
    tuning = (protocol.tuning_seeds if arguments.tuning_seeds is None else arguments.tuning_seeds) or None
    planned = 0
    for name in names:
        attack = find_attack(name, table)
        planned += count_runs(attack, plan_runs(attack, seeds, settings.get(name), trials), seeds, tuning)

    folder, _ = local_folder(
        arguments.model_path,
        revision=arguments.revision,
        into=arguments.output_path or working_folder(arguments.model_path),
    )
    context = make_context(task_arguments, arguments, folder, str(state.device))
    output = Path(arguments.output_path or folder)
    with tqdm(total=planned, desc=f"attacks on {output.name} ({arguments.role})", unit="run", disable=None) as bar:

        def progress(trace, made):
            bar.set_postfix_str(trace.attack if made else "on disk", refresh=False)
            bar.total = max(bar.total, bar.n + 1)  # a second finalist was not planned
            bar.update()

        summary = run_suite(
            context, table, names, seeds, output, settings, trials=trials, tuning_seeds=tuning,
            overwrite=arguments.overwrite, progress=progress,
        )
    print(
        f"{output / 'traces' / arguments.role}: {summary.made} runs made, {summary.kept} kept from before, "
        f"{summary.diverged} diverged (failed tries of the attacker)."
    )


def choose_table(task: str, protocol: Protocol) -> tuple[dict, tuple[str, ...], tuple[str, ...]]:
    """Attacks, the protocol's settings of them, and their planned names, for one of the two tasks."""
    if task not in ("harmful", "benign"):
        raise ConfigError(f"expected task harmful or benign, got {task!r}.")
    if task == "benign":
        return TRAINABILITY, protocol.benign_settings(), protocol.trainability
    return ATTACKS, protocol.settings, protocol.attacks


def make_context(
    task_arguments: TaskArguments, arguments: AttackArguments, folder: Path, device: str
) -> AttackContext:
    """The attacked model and the attacker's three splits."""
    processor = load_processor(folder)
    task = Task(task_arguments, arguments.task)
    splits = {role: task.pixels(role, processor) for role in ("attack", "validation", "test")}
    mixed = arguments.task == "harmful" and task_arguments.benign_dataset is not None
    return AttackContext(
        folder=folder,
        role=arguments.role,
        **splits,
        data=tuple(task.fingerprint(split, role) for role, split in splits.items()),
        feature_module=arguments.feature_module,
        device=device if arguments.device == "auto" else arguments.device,
        attack_fraction=arguments.attack_fraction,
        base=None if arguments.base_path is None else Path(arguments.base_path),
        benign=Task(task_arguments, "benign").pixels("attack", processor) if mixed else None,
    )


if __name__ == "__main__":
    try:
        main()
    except ImmunizeError as error:
        sys.exit(f"{type(error).__name__}: {error}")
