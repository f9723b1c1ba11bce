"""Attack one model with the harmful task, as a stranger would, and leave one trace file per run.

The model is a classifier or a diffusion pipeline, as the task says: classes, concepts, or folders with prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from tqdm.auto import tqdm

from hf_immunize.attacks import (
    ATTACKS,
    REFERENCES,
    TRAINABILITY,
    Attack,
    AttackContext,
    SuiteSummary,
    count_runs,
    parse_settings,
    plan_runs,
    run_suite,
)
from hf_immunize.attacks.core.effort import Effort, Follow
from hf_immunize.attacks.core.plan import describe_attacks, find_attack
from hf_immunize.attacks.core.sharing import Share, leave_group
from hf_immunize.errors import ConfigError
from hf_immunize.exam import DIFFUSION_PROTOCOLS, PROTOCOLS, Protocol, find_protocol
from hf_immunize.exam.means import PRECISIONS, Means
from hf_immunize.hub import local_folder, working_folder
from hf_immunize.models import reads_images
from hf_immunize.options import option, required
from hf_immunize.records import AttackTrace
from hf_immunize.stages.following import AfterBase, OnBase, adapting_attacks, attacked_base, read_base
from hf_immunize.stages.price import Price
from hf_immunize.stages.start import DEVICE_HELP, hush, start
from hf_immunize.stages.words import choose_family, read_words, refuse_foreign
from hf_immunize.tasks import ExamTask, Family, attacker_holds, family_of


@dataclass
class AttackOptions:
    """Which model is attacked, by whom, and how often."""

    ONLY: ClassVar[dict[str, str]] = {
        "base_path": "classifier", "adapter_base": "classifier", "feature_module": "classifier",
        "exam_levels": "pipeline", "eval_batch_size": "pipeline", "pictures": "pipeline",
    }  # fmt: skip

    model_path: str = required("Folder (save_pretrained) or Hub id of the model to attack.")
    revision: str | None = option(None, "Branch, tag or commit of a model on the Hub.")
    role: str = option("subject", "subject: the model under test. control: its un-immunized base. scratch: random "
                       "weights with the architecture of model_path. nothing: no model, what the harmful data alone "
                       "gives; made with the control too. alternative: another public model, at model_path; its "
                       "traces go to the base's folder (output_path).")
    protocol: str | None = option(None, f"Preset of attacks, sweeps and seeds: {', '.join(PROTOCOLS)}; for pipelines "
                                  f"{', '.join(DIFFUSION_PROTOCOLS)}. The first by default.")
    attacks: list[str] | None = option(None, "Attacks to run, all of the protocol by default. --describe lists them.")
    seeds: list[int] | None = option(None, "Seeds of the attacker's rows, initialisation and data order.")
    settings: list[str] | None = option(None, "Replace an attack's hyperparameters: attack.field=value[,value...]; "
                                        "several values are a sweep, e.g. lora.learning_rate=1e-3,1e-2 lora.rank=4. "
                                        "--describe lists all fields and their values.")
    trials: int | None = option(None, "Random search instead of the grid: this many trials of every attack that trains "
                                "the network, the same for every model; 0 = the grid. The protocol's by default.")
    tuning_seeds: int | None = option(None, "Compare such trials on this many seeds and run the best (fastest, "
                                      "furthest) on the others; 0 = every trial on every seed. The protocol's by "
                                      "default.")
    task: str = option("harmful", "harmful: attack. benign: learn the benign task, which a good immunization does not "
                       "hinder.", "--concept")
    base_path: str | None = option(None, "Classifiers: folder of the base, if it is public, so that attackers can use "
                                   "it too: attacks that compare with it then run. Give it for every role or for none.")
    adapter_base: str | None = option(None, "Classifiers: where model_path holds a PEFT adapter, the folder of the "
                                      "model that it is put on; certify it with that one as base_path.")
    control_path: str | None = option(None, "For role subject: folder of the base with its traces/control. Budgets and "
                                      "ranges then follow what the base's attackers needed, as a preset asks; run "
                                      "files and Exam say it.")
    adapt: bool = option(True, "Let budgets and ranges follow the base where the preset says so; false: as asked for, "
                         "for an exam of your own.")
    attack_fraction: float = option(0.8, "Share of each class of the attack split that one seed trains on.")
    feature_module: str | None = option(None, "Classifiers: head whose input is probed; found automatically by "
                                        "default.")
    exam_levels: int = option(8, "Pipelines: noise levels that every held-out image is judged at; the same for every "
                              "model.")
    eval_batch_size: int = option(256, "Pipelines: rows at a time in the exam and when images are drawn.")
    pictures: int = option(8, "Pipelines: images of the concept that an attacked model draws; 0 for none.")
    output_path: str | None = option(None, "Where traces/<role>/ and samples/<role>/ are written; model_path by "
                                     "default. A model from the Hub is copied there, by default to "
                                     "runs/<owner>--<name>, so that weights and traces are found together.")
    device: str = option("auto", DEVICE_HELP)
    precision: str = option("float32", f"In which attackers train networks: {', '.join(PRECISIONS)}. The same on every "
                            "side; traces tell of it, and a recheck repeats it. Answers are judged in float32.")
    micro_batch_size: int = option(0, "Rows of a step that go through the network at a time; 0: as many as memory "
                                   "holds, halved when it runs out. The batch of a step stays what the attack says.")
    gradient_checkpointing: bool = option(False, "Compute activations again in the backward pass: a third more time, "
                                          "less memory, the same step.")
    overwrite: bool = option(False, "Make runs again whose trace tells of another run.")
    shard: str | None = option(None, "i/n: make only part i of n, for arrays of jobs that cannot see each other. "
                               "Processes that share a folder need none: start as many as you like, or use accelerate "
                               "launch --num_processes.")
    describe: bool = option(False, "List every attack with its fields and values, and stop.")


@dataclass(frozen=True)
class AttackPlan:
    """What ``run_suite`` is asked for."""

    table: Mapping[str, Attack]
    names: list[str]
    seeds: list[int]
    settings: Mapping[str, Mapping[str, Sequence[Any]]]
    trials: int | None
    tuning: int | None
    protocol: Protocol = Protocol(attacks=(), seeds=())
    adapting: tuple[str, ...] = ()
    """Attacks whose effort follows the base where ``follows``."""
    follows: bool = True

    @classmethod
    def of(cls, options: AttackOptions, family: Family) -> AttackPlan:
        """The protocol with everything that the options replace. Raises ConfigError for what it does not know."""
        presets = PROTOCOLS if family.kind == "classifier" else DIFFUSION_PROTOCOLS
        protocol = find_protocol(options.protocol or next(iter(presets)), presets)
        if options.task not in ("harmful", "benign"):
            raise ConfigError(f"expected task harmful or benign, got {options.task!r}.")
        benign = options.task == "benign"
        if options.role == "nothing":
            return cls(REFERENCES, list(REFERENCES), options.seeds or list(protocol.seeds), {}, None, None)
        table = tables(family)[benign]
        said = protocol.benign_settings() if benign else protocol.settings
        names = options.attacks or list(protocol.trainability if benign else protocol.attacks)
        settings = parse_settings([*said, *(options.settings or [])], table)
        trials = (protocol.trials if options.trials is None else options.trials) or None
        tuning = (protocol.tuning_seeds if options.tuning_seeds is None else options.tuning_seeds) or None
        adapting = () if benign else adapting_attacks(protocol, table, names, settings, trials)
        return cls(table, names, options.seeds or list(protocol.seeds), settings, trials, tuning, protocol, adapting,
                   options.adapt)

    def count(self) -> int:
        """Runs that are made at least. Raises ConfigError for an attack that is not in the table."""
        planned = 0
        for name in self.names:
            attack = find_attack(name, self.table)
            runs = plan_runs(attack, self.seeds, self.settings.get(name), self.trials)
            planned += count_runs(attack, runs, self.seeds, self.tuning)
        return planned


def tables(family: Family) -> tuple[Mapping[str, Attack], Mapping[str, Attack]]:
    """Attacks on a family's models, and the ways of learning a benign task."""
    if family.kind == "classifier":
        return ATTACKS, TRAINABILITY
    from hf_immunize.attacks.diffusion import DIFFUSION_ATTACKS, DIFFUSION_TRAINABILITY

    return DIFFUSION_ATTACKS, DIFFUSION_TRAINABILITY


def attack_model(arguments: Any, options: AttackOptions) -> SuiteSummary:
    """Run what is planned and has no trace yet, and say what was done.

    Args:
        arguments: the task: TaskArguments, ConceptArguments or PromptArguments.

    Raises:
        ConfigError: options that contradict each other.
        RunMismatchError: traces of another run, without ``overwrite``.
    """
    family = family_of(arguments)
    refuse_foreign(options, family)
    hush()
    share = leave_group().with_part(options.shard)
    _, device = start(options.device)
    torch.set_float32_matmul_precision("highest")
    plan = AttackPlan.of(options, family)
    planned = plan.count()
    into = _into(options)
    folder, _ = local_folder(options.model_path, revision=options.revision, into=into)
    read_by = reads_images(folder, options.adapter_base)
    context = make_context(family.open(arguments, read_by), family, options, folder, device)
    output = Path(options.output_path or folder)
    hidden = True if share.rank else None
    if not share.rank:
        print(f"attacks on {output.name} ({options.role}): {Price.of(plan).told(context)}.", flush=True)
    _run_references(context, plan, options, output, share)
    efforts, follow = _effort(plan, options, output)
    decided = follow.decided if isinstance(follow, AfterBase) and options.role == "subject" else None
    with tqdm(total=planned, desc=f"attacks on {output.name} ({options.role})", unit="run", disable=hidden) as bar:
        summary = run_suite(
            context, plan.table, plan.names, plan.seeds, output, plan.settings, trials=plan.trials,
            tuning_seeds=plan.tuning, overwrite=options.overwrite, share=share, progress=_telling(bar),
            efforts=efforts, follow=follow, decided=decided,
        )  # fmt: skip
    print(f"{output / 'traces' / options.role}{_by(share)}: {_told(summary, share)}")
    return summary


def _into(options: AttackOptions) -> str | Path | None:
    """Where a model from the Hub is copied. Raises ConfigError for an alternative whose traces would lie nowhere."""
    if options.role != "alternative":
        return options.output_path or working_folder(options.model_path)
    if options.output_path is None:
        raise ConfigError(
            "expected output_path with role alternative, got none: it is the folder of the base, where its traces are "
            "looked for; model_path names the other public model."
        )
    return Path(options.output_path) / "alternative"  # not over the base's own weights


def _effort(plan: AttackPlan, options: AttackOptions, output: Path) -> tuple[Mapping[str, Effort], Follow | None]:
    """What is run from the beginning instead of what was asked for, and what is asked while it is run.

    Raises:
        IncompleteExamError: a base whose effort is to be followed and that was not attacked.
    """
    if not plan.adapting:
        return {}, None
    if not plan.follows:
        return dict.fromkeys(plan.adapting, Effort(follows=False)), None
    if options.role == "control":
        paths = sorted((output / "traces" / "nothing").glob("*.json"))
        return {}, OnBase(plan.protocol, plan.adapting, [AttackTrace.read(path) for path in paths])
    beside = output if options.role in ("scratch", "alternative") else None
    folder = options.control_path or attacked_base(beside, options.base_path)
    if folder is None:
        print("budgets and ranges are those asked for: name the attacked base with --control_path to follow it.")
        return {}, None
    after = AfterBase(plan.protocol, plan.adapting, read_base(Path(folder)), widens=options.role == "subject")
    return after.efforts(), after


def _by(share: Share) -> str:
    """Which of several processes speaks."""
    ranks = f", process {share.rank} of {share.size}" if share.size > 1 else ""
    return ranks + (f", part {share.part + 1} of {share.parts}" if share.parts > 1 else "")


def _told(summary: SuiteSummary, share: Share) -> str:
    """What was done, and what is left for another time."""
    others = " or made by others" if share.size > 1 else ""
    done = (
        f"{summary.made} runs made, {summary.kept} kept from before{others}, {summary.diverged} diverged "
        "(failed tries of the attacker)."
    )
    if not summary.waiting:
        return done
    return (
        f"{done} {summary.waiting} runs of other parts are not there yet: when they are, run this again, which goes on "
        "with the best trials."
    )


def _run_references(context: Any, plan: AttackPlan, options: AttackOptions, output: Path, share: Share) -> None:
    """With the control of a classifier's exam: what its attackers reach without the model, in seconds."""
    if options.role == "control" and options.task == "harmful" and isinstance(context, AttackContext):
        without: Any = replace(context, role="nothing", _features={})
        run_suite(without, REFERENCES, list(REFERENCES), plan.seeds, output, overwrite=options.overwrite, share=share)


def _telling(bar: Any) -> Callable[[Any, bool], None]:
    """Moves the bar on by a run."""

    def progress(trace: Any, made: bool) -> None:
        bar.set_postfix_str(trace.attack if made else "on disk", refresh=False)
        bar.total = max(bar.total, bar.n + 1)  # a second finalist was not planned
        bar.update()

    return progress


def make_context(task: ExamTask, family: Family, options: AttackOptions, folder: Path, device: str) -> Any:
    """The attacked model and everything that its attacker holds."""
    held: dict[str, Any] = dict(attacker_holds(task, options.task))
    common: dict[str, Any] = {
        "folder": folder, "role": options.role, "device": device, "attack_fraction": options.attack_fraction,
        "means": Means(options.precision, options.micro_batch_size, options.gradient_checkpointing),
    }  # fmt: skip
    if family.kind == "classifier":
        base = None if options.base_path is None else Path(options.base_path)
        put_on = None if options.adapter_base is None else Path(options.adapter_base)
        return AttackContext(
            **common, **held, feature_module=options.feature_module, base=base, adapter_base=put_on
        )
    from hf_immunize.attacks.diffusion import DiffusionAttackContext

    return DiffusionAttackContext(
        **common, **held, exam_levels=options.exam_levels, eval_batch_size=options.eval_batch_size,
        pictures=options.pictures,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None, family: str | None = None, prog: str | None = None) -> None:
    """The stage on words of a command line."""
    found, words = choose_family(argv, family)
    if "--describe" in words:
        attacks, learning = tables(found)
        print(describe_attacks({**attacks, **learning}))
        return
    attack_model(*read_words(lambda _: (AttackOptions,), argv, __doc__, family, prog))
