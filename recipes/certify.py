"""Judge an attacked model against its attacked base: write certificate.json and the model card README.md.

    accelerate launch recipes/certify.py --config recipes/digits-vit/task.yaml \
        --model_path runs/digits-vit/closed_form_adversary --base_path runs/digits-vit/base
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import transformers
from accelerate import PartialState
from rich.console import Console

from hf_immunize.attacks import AttackContext
from hf_immunize.certification import PROTOCOLS, ExamData, Rule, build_certificate, find_protocol, recheck
from hf_immunize.data import Task, TaskArguments, warn_of_copies
from hf_immunize.errors import ImmunizeError
from hf_immunize.hub import is_hub_id, local_folder, working_folder, write_card
from hf_immunize.hub.tables import certificate_table
from hf_immunize.models import load_processor, refuse_folder
from hf_immunize.options import parse_options


@dataclass
class CertifyArguments:
    """Which model is judged against which base."""

    model_path: str = field(
        metadata={
            "help": "Folder of the model under test, with traces/subject/; or the Hub id it was attacked by, which "
            "stands for the folder attack.py copied it to."
        }
    )
    base_path: str = field(metadata={"help": "The same for the un-immunized base, with traces/control/."})
    revision: str | None = field(default=None, metadata={"help": "Revision of a model_path on the Hub."})
    base_revision: str | None = field(default=None, metadata={"help": "Revision of a base_path on the Hub."})
    protocol: str = field(
        default="quick",
        metadata={"help": f"Preset exam whose attacks must be there or are named NOT RUN: {', '.join(PROTOCOLS)}."},
    )
    threshold: float | None = field(
        default=None,
        metadata={"help": "Harmful accuracy (0..1) that counts as success; by default a share of the base's best."},
    )
    feature_module: str | None = field(
        default=None, metadata={"help": "Layer whose input's spectrum is measured; the head by default."}
    )
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda or mps."})
    recheck: int = field(
        default=0,
        metadata={"help": "Write nothing; sit this many random cells of the certificate again and compare."},
    )
    recheck_seed: int = field(default=0, metadata={"help": "Which cells are drawn for the recheck."})


def main(argv: Sequence[str] | None = None) -> None:
    """Judge, write, and print."""
    task_arguments, arguments = parse_options((TaskArguments, CertifyArguments), argv, description=__doc__)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.simplefilter("ignore", FutureWarning)  # the libraries' own, about each other
    state = PartialState(cpu=arguments.device == "cpu")
    if not state.is_main_process:
        return
    arguments.model_path = working_copy(arguments.model_path, arguments.revision)
    arguments.base_path = working_copy(arguments.base_path, arguments.base_revision)
    protocol = find_protocol(arguments.protocol)
    processor = load_processor(arguments.model_path)
    primary, harmful = Task(task_arguments, "primary"), Task(task_arguments, "harmful")
    test = primary.pixels("test", processor)
    splits = {role: harmful.pixels(role, processor) for role in ("attack", "validation", "test")}
    benign = benign_splits(task_arguments, processor)
    warn_of_copies(primary, harmful, *[task for task, _ in benign.values()][:1])
    data = ExamData(
        primary_test=test,
        harmful_attack=splits["attack"],
        primary=(primary.fingerprint(test, "test"),),
        harmful=tuple(harmful.fingerprint(split, role) for role, split in splits.items()),
        benign=tuple(task.fingerprint(split, role) for role, (task, split) in benign.items()),
    )
    device = str(state.device) if arguments.device == "auto" else arguments.device
    if arguments.recheck:
        mixed = benign["attack"][1] if benign else None
        check_again(arguments, protocol.rule, data, splits | {"benign": mixed}, device)
        return
    certificate = build_certificate(
        arguments.model_path,
        arguments.base_path,
        data,
        protocol,
        threshold=arguments.threshold,
        feature_module=arguments.feature_module,
        device=device,
    )
    folder = Path(arguments.model_path)
    certificate.write(folder / "certificate.json")
    write_card(folder)
    console = Console()
    if not console.is_terminal:
        console.width = 120  # logs are not 80 columns wide
    console.print(certificate_table(certificate))
    for found in certificate.trainability:
        print(f"benign trainability, {found.attack.removeprefix('benign_')}: {found.verdict}, {found.reason}")
    print(f"certificate: {folder / 'certificate.json'}")


def benign_splits(arguments: TaskArguments, processor) -> dict:
    """Task and pixels of each split of the third task; nothing where there is none."""
    if arguments.benign_dataset is None:
        return {}
    task = Task(arguments, "benign")
    return {role: (task, task.pixels(role, processor)) for role in ("attack", "validation", "test")}


def working_copy(named: str, revision: str | None) -> str:
    """The folder that attack.py worked in; a path that is not there is left to the judge to explain."""
    refuse_folder(named)
    if revision is None and not is_hub_id(named):
        return named
    return str(local_folder(named, revision=revision, into=working_folder(named))[0])


def check_again(arguments: CertifyArguments, rule: Rule, data: ExamData, splits: dict, device: str) -> None:
    """Sit random cells again; leave with an error when a stored interval does not hold."""
    options = {"data": data.harmful, "feature_module": arguments.feature_module, "device": device, **splits}
    options["base"] = Path(arguments.base_path)
    contexts = {
        role: AttackContext(folder=Path(path), role=role, **options)
        for role, path in (("subject", arguments.model_path), ("control", arguments.base_path))
    }
    found = recheck(arguments.model_path, contexts, arguments.recheck, arguments.recheck_seed, rule)
    print("\n".join(line.told for line in found))
    if not all(line.agrees for line in found):
        sys.exit("the certificate does not hold on this machine: see above.")


if __name__ == "__main__":
    try:
        main()
    except ImmunizeError as error:
        sys.exit(f"{type(error).__name__}: {error}")
