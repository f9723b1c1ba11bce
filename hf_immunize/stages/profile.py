"""Find out in which layers of a classifier the harmful task can be learned, before defending it.

Only the defender's own rows of the harmful task are used (its split ``defense``, cut in three by content); those of the
exam stay unseen. Traces lie in output_path/profile, what they say in output_path/profile.json and profile.svg.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from hf_immunize.attacks import REFERENCES, AttackContext, load_processor, run_suite
from hf_immunize.attacks.core.plan import plan_runs
from hf_immunize.attacks.core.shape import Attack
from hf_immunize.attacks.vision.depth import block_probes, count_of, place_of, reset_attacks, trunk_of
from hf_immunize.certification.depth import Measured, Trunk, judge_depth
from hf_immunize.data import PixelDataset, TaskArguments, parse_fractions
from hf_immunize.errors import ConfigError, DataError
from hf_immunize.hub import local_folder, working_folder
from hf_immunize.options import option, parse_options, required
from hf_immunize.records import PROFILE_FILE, AttackTrace, DepthProfile, DepthRule, Provenance, atomic_write
from hf_immunize.report import depth_picture
from hf_immunize.stages.start import DEVICE_HELP, hush, start
from hf_immunize.tasks import ClassesTask

_PARTS = {"profile_attack": 0.4, "profile_validation": 0.2, "profile_test": 0.4}
"""How the defender's harmful rows are shared out: to train on, to choose rates on, to be judged on."""
_RANDOM_SEEDS = 3
"""Draws of random weights that blocks are probed on."""


@dataclass
class ProfileOptions:
    """Which model is looked at, and how closely."""

    model_path: str = required("Folder (save_pretrained) or Hub id of a classifier that nobody has defended yet.")
    revision: str | None = option(None, "Branch, tag or commit of a model on the Hub.")
    output_path: str | None = option(None, "Where profile.json, profile.svg and traces are written; model_path by "
                                     "default. Give the folder of hf-immunize init, which then uses the profile.")
    counts: list[int] | None = option(None, "How many last blocks are drawn anew, e.g. 0 3 7; every number by default. "
                                      "0 is always among them.")
    seeds: list[int] | None = option(None, "Seeds of rows, initial weights and data order; 0 to 4 by default.")
    steps: int = option(120, "Budget of every fine-tuning, in steps of 32 rows.")
    learning_rates: list[float] | None = option(None, "Rates that are compared on the first seed for every number of "
                                                "blocks; 1e-4, 1e-3 and 1e-2 by default.")
    target: float = option(DepthRule().target, "Slow-down that the proposed depth has to leave room for.")
    device: str = option("auto", DEVICE_HELP)
    overwrite: bool = option(False, "Make runs again whose trace tells of another run.")

    def __post_init__(self) -> None:
        if self.steps < 2 or not self.target > 1:
            raise ConfigError(f"expected at least 2 steps and a target above 1, got {self.steps} and {self.target}.")


def profile_model(arguments: TaskArguments, options: ProfileOptions) -> DepthProfile:
    """Run what has no trace yet, write ``profile.json`` and ``profile.svg``, and return the profile.

    Raises:
        ConfigError: counts or rates that cannot be run.
        DataError: too few harmful rows of the defender's to be cut in three.
        ModelError: a model without a list of blocks or without a linear head.
        RunMismatchError: traces of another run, without ``overwrite``.
    """
    hush()
    _, device = start(options.device, alone="profile is one process")
    into = options.output_path or working_folder(options.model_path)
    folder, _ = local_folder(options.model_path, revision=options.revision, into=into)
    output = Path(options.output_path or folder)
    context = defender_context(arguments, folder, device)
    model = context.model(0)
    blocks, stages, sites = trunk_of(model, context.head)
    trunk = Trunk(blocks, stages, sites, context.head)
    counts = _counts(options.counts, len(blocks))
    seeds = options.seeds or [0, 1, 2, 3, 4]
    rates = options.learning_rates or [1e-4, 1e-3, 1e-2]
    rule = DepthRule(target=options.target)
    resets = reset_attacks(counts, len(blocks), rates, options.steps)
    found = _run(context, resets, block_probes(sites[: len(blocks)]), seeds, output / "profile", options.overwrite)
    judged = judge_depth(found, trunk, rule)
    profile = DepthProfile(
        model=context.fingerprint, data=list(context.data), seeds=seeds, budget=options.steps, blocks=blocks, rule=rule,
        without=judged.without.mean, without_told=judged.without.told, uplift=judged.uplift, threshold=judged.threshold,
        resets=judged.resets, depths=judged.depths, proposal=judged.proposal, provenance=Provenance.here(device),
    )  # fmt: skip
    profile.write(output / PROFILE_FILE)
    atomic_write(output / "profile.svg", depth_picture(profile))
    return profile


def _counts(asked: Sequence[int] | None, blocks: int) -> list[int]:
    """Numbers of last blocks, 0 among them. Raises ConfigError for more than there are."""
    counts = sorted({0, *(range(blocks + 1) if asked is None else asked)})
    if counts[0] < 0 or counts[-1] > blocks:
        raise ConfigError(f"expected counts in 0..{blocks}, the model's blocks, got {list(asked or [])}.")
    return counts


def defender_context(arguments: TaskArguments, folder: Path, device: str) -> AttackContext:
    """An attacker made of the defender's own harmful rows: none of the exam's are among them.

    Raises:
        DataError: no split ``defense``, or too few rows in it for three parts.
    """
    shares = parse_fractions(arguments.harmful_splits)
    if "defense" not in shares:
        raise DataError(f"expected a split defense in harmful_splits, the defender's own rows, got {sorted(shares)}.")
    parts: dict[str, float] = {}
    for name, share in shares.items():
        parts |= {part: share * of for part, of in _PARTS.items()} if name == "defense" else {name: share}
    cut = dataclasses.replace(arguments, harmful_splits=",".join(f"{name}={share!r}" for name, share in parts.items()))
    processor = load_processor(folder)
    whole, side = ClassesTask(arguments, processor).side("harmful"), ClassesTask(cut, processor).side("harmful")
    own = set(whole.looks()["defense"][1])
    rows: list[PixelDataset] = []
    for part in _PARTS:
        # Classes of few images are cut elsewhere when there are more splits: what is not the defender's is left out.
        kept = [place for place, row in enumerate(side.looks()[part][1]) if row in own]
        rows.append(side.pixels(part, processor).subset(torch.tensor(kept, dtype=torch.long)))
        if not kept:
            raise DataError(f"expected harmful rows of the defender's for {part}, got none: bring more images.")
    prints = tuple(side.fingerprint(dataset, part) for dataset, part in zip(rows, _PARTS, strict=True))
    attack, validation, test = rows
    return AttackContext(
        folder=folder, role="control", attack=attack, validation=validation, test=test, data=prints, device=device
    )


def _run(
    context: AttackContext, resets: Mapping[str, Attack], probes: Mapping[str, Attack], seeds: Sequence[int],
    output: Path, overwrite: bool,
) -> Measured:
    """Every run that has no trace yet; all of them, sorted."""
    plain = next(iter(resets))
    plans: list[tuple[str, dict[str, Attack], Sequence[int], int | None]] = [
        ("control", dict(resets), seeds, 1), ("scratch", {plain: resets[plain]}, seeds, 1),
        ("control", dict(probes), seeds, None), ("scratch", dict(probes), seeds[:_RANDOM_SEEDS], None),
        ("nothing", dict(REFERENCES), seeds, None),
    ]  # fmt: skip
    traces: dict[str, list[AttackTrace]] = {"control": [], "scratch": [], "nothing": []}
    planned = sum(len(plan_runs(attack, chosen)) for _, table, chosen, _ in plans for attack in table.values())
    with tqdm(total=planned, desc="profile", unit="run") as bar:
        for role, table, chosen, tuning in plans:

            def keep(trace: AttackTrace, made: bool, into: list[AttackTrace] = traces[role]) -> None:
                into.append(trace)
                bar.set_postfix_str(trace.attack if made else "on disk", refresh=False)
                bar.update()

            given: Any = role
            held: Any = context if role == "control" else replace(context, role=given, prepared={}, _features={})
            run_suite(
                held, table, list(table), chosen, output, tuning_seeds=tuning, overwrite=overwrite, progress=keep
            )
    return _sorted(traces, resets, probes, len(context.test), context.classes)


def _sorted(
    traces: Mapping[str, list[AttackTrace]], resets: Mapping[str, Attack], probes: Mapping[str, Attack], rows: int,
    classes: int,
) -> Measured:
    def of(role: str, name: str) -> list[AttackTrace]:
        return [trace for trace in traces[role] if trace.attack == name]

    by_count: dict[int | None, Sequence[AttackTrace]] = {count_of(name): of("control", name) for name in resets}
    by_count[None] = of("scratch", next(iter(resets)))
    order = sorted(probes, key=lambda name: place_of(name) or 0)
    return Measured(
        by_count, [of("control", name) for name in order], [of("scratch", name) for name in order], traces["nothing"],
        rows, classes,
    )


def show(profile: DepthProfile) -> None:
    """Two small tables and the proposal on the terminal."""
    console = Console()
    resets = Table(title="full fine-tuning after the last n blocks were drawn anew")
    for column in ("n", "rate", "T(n), steps", "T(n)/T(0)", "95 % interval"):
        resets.add_column(column)
    plain = profile.resets[0].steps
    for point in profile.resets:
        name = "all, random weights" if point.blocks is None else str(point.blocks)
        steps = f"> {profile.budget}" if point.steps is None else f"{point.steps:.1f}"
        least = "" if point.steps is not None else "> "
        ratio = "" if plain is None else f"{least}{(point.steps or profile.budget) / plain:.2f}"
        low, high = (("open" if end is None else f"{end:.2f}") for end in (point.ratio.low, point.ratio.high))
        resets.add_row(name, f"{point.learning_rate:g}", steps, ratio, f"{low} to {high}")
    depths = Table(title=f"probe accuracy by block; without the model {100 * profile.without:.1f} % "
                         f"({profile.without_told})")
    for column in ("block", "model", "random weights"):
        depths.add_column(column)
    for at in profile.depths:
        depths.add_row(at.block, f"{100 * at.trained:.1f} %", f"{100 * at.random:.1f} %")
    console.print(resets)
    console.print(depths)
    estimate = profile.uplift.estimate or 0.0
    print(f"uplift over no model: {100 * estimate:.1f} points")
    told = profile.proposal
    print(f"proposed: trainable_modules: {told.trainable_modules or '(everything)'}, sites: {','.join(told.sites)}")
    print(told.told)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """The stage on words of a command line."""
    arguments, options = parse_options((TaskArguments, ProfileOptions), argv, (__doc__ or "").split("\n\n")[0], prog)
    profile = profile_model(arguments, options)
    show(profile)
    print(f"profile: {Path(str(options.output_path or working_folder(options.model_path))) / PROFILE_FILE}")


