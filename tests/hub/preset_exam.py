"""A preset exam on a folder whose traces are formulas: every trial and seed that the preset asks for.

The judge is the real one. Some attacks are slowed tenfold, two are not, and one finds nothing to attack.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import record_builders as build
from models import save_vit
from published import EXPIRES, config_of_vit, provenance
from rejudged import judge_again

from hf_immunize.attacks import ATTACKS, REFERENCES, TRAINABILITY, Run, parse_settings, plan_trials
from hf_immunize.attacks.core.effort import Effort
from hf_immunize.attacks.core.plan import is_searchable
from hf_immunize.certification.planning import plan_exam
from hf_immunize.exam import PROTOCOLS
from hf_immunize.exam.keeps import finalists
from hf_immunize.hub.policy import NEEDS_BASE
from hf_immunize.records import AttackTrace, Certificate, Evaluation, ModelFingerprint, loading_files
from hf_immunize.stages.following import AfterBase, OnBase

PRESET = PROTOCOLS["quick"]
BREAKS = ("full_finetune", "ridge_probe")
DOES_NOT_APPLY = "earlier_layer_probe"
ROWS = {"train": 40, "validation": 40, "test": 40}


@cache
def trials_of(name: str, preset=PRESET):
    benign = name in TRAINABILITY
    table, said = (TRAINABILITY, preset.benign_settings()) if benign else (ATTACKS, preset.settings)
    return plan_trials(table[name], parse_settings(said, table).get(name), preset.trials)


def splits(task: str):
    return [build.dataset(f"{task}/{split}", "scikit-learn digits", build.LABELS).model_copy(
        update={"sha256": f"{number}" * 64 if task == "harmful" else f"{number}b" * 32})
        for number, split in enumerate(ROWS)]


def run(name: str, role: str, planned: Run, number: int, model, breaks, skipped) -> AttackTrace:
    """The first trial learns, each further one half as fast; the subject ten times later where the attack is slowed."""
    attack = (TRAINABILITY if name in TRAINABILITY else ATTACKS)[name]
    config, trial, seed, tuning = planned.config, planned.trial, planned.seed, planned.tuning
    budget = getattr(config, "steps", 1)
    slowed = role == "subject" and name not in breaks and name not in TRAINABILITY
    trains = hasattr(config, "batch_size")  # by so many steps that budgets grow, and cost what the rule asks for
    reach = max(1.0, budget / (10 if trains else 80)) * (1 + 0.1 * seed) * (12 if slowed else 1) * 2**number
    steps = [1] if attack.unit == "solve" else sorted({0, 1, 2, 3, 5, 8, *(
        round(budget * share) for share in (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1))})
    curve = []
    for step in (step for step in steps if step <= budget):
        low_ceiling = attack.unit == "solve" and slowed
        value = 0.2 + 0.65 * (0.3 if low_ceiling else 1 - math.exp(-step / reach) if attack.unit == "step" else 1)
        value = min(0.99, value + 0.004 * math.sin(seed + step + number))
        curve.append(Evaluation(step=step, validation=value, test=value))
    left_out = name in skipped
    task = "benign" if name in TRAINABILITY else "harmful"
    return AttackTrace(
        attack=name, family=attack.family, trial=trial, seed=seed, role=role, model=model, data=splits(task),
        config=json.loads(json.dumps(asdict(config))) | {
            "attack_fraction": 0.8, "feature_module": "classifier",
            **({"tuning_seeds": list(tuning)} if tuning else {}),
            **({"widened": planned.widened} if planned.widened else {}),
            **({"proposed": planned.proposed} if planned.proposed else {}),
            **({"base": None} if "base" in attack.needs else {}),
        },
        unit=attack.unit, budget=budget, samples=rows_of(config) * budget,
        curve=[] if left_out else curve, seconds=0.1, provenance=provenance(),
        outcome="not_applicable" if left_out else "completed", note="there is nothing to attack" if left_out else None,
    )


def rows_of(config) -> int:
    """Training rows of a step."""
    return getattr(config, "batch_size", splits("harmful")[0].rows)


def runs_of(name: str, role: str, model, preset, breaks, skipped, effort=Effort(), follow=None) -> list[AttackTrace]:  # noqa: B008
    """Every trial on every seed; where the preset compares trials on a few seeds first, the finalists on the others.

    Effort follows the base as in the attack stage.
    """
    attack, trials = (TRAINABILITY if name in TRAINABILITY else ATTACKS)[name], trials_of(name, preset)
    tuning = preset.seeds[: preset.tuning_seeds or 0]
    staged = tuning and is_searchable(attack) and len(trials) > 1
    asked = [Run(config, trial, seed, tuning if staged else ())
             for config, trial in trials for seed in (tuning if staged else preset.seeds)]
    order = {trial: number for number, (_, trial) in enumerate(trials)}

    def made(runs):
        return [run(name, role, one, order.get(one.trial, len(trials) + one.widened + one.proposed), model, breaks,
                    skipped) for one in runs]

    while further := follow(name, made(effort.applied(asked)), effort) if follow else None:
        effort = further
    compared = effort.applied(asked)
    first = made(compared)
    if not staged:
        return first
    chosen = {one.trial: one for one in compared if one.trial in finalists(first)}
    return first + made([replace(one, seed=seed) for one in chosen.values() for seed in preset.seeds[len(tuning):]])


def references_of(preset) -> list[AttackTrace]:
    """Attackers without the model, who get a quarter of the rows right."""
    nobody = ModelFingerprint(name="no model", architecture="none", parameters=0, weights={})
    point = {"validation": 0.25, "test": 0.25}
    return [
        AttackTrace(
            attack=name, family=about.family, trial=trial, seed=seed, role="nothing", model=nobody,
            data=splits("harmful"), config=json.loads(json.dumps(asdict(config))) | {"attack_fraction": 0.8},
            unit=about.unit, budget=(budget := getattr(config, "steps", 1)), samples=rows_of(config) * budget,
            curve=[Evaluation(step=budget, **point)], outcome="completed", seconds=0.1, provenance=provenance())
        for name, about in REFERENCES.items()
        for config, trial in plan_trials(about, None, None) for seed in preset.seeds
    ]


def preset_exam(
    root: Path, preset=PRESET, breaks=BREAKS, skipped=(DOES_NOT_APPLY,), weights=b"synthetic weights", files=None
) -> Path:
    """The certified folder.

    Args:
        breaks: attacks that the model does not slow down.
        skipped: attacks that do not apply.
        files: others that loading reads, by name.
    """
    folder = root / preset.name
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(weights)
    for name, data in ({"config.json": json.dumps(config_of_vit()).encode()} | (files or {})).items():
        (folder / name).write_bytes(data)
    base = build.base_folder(root)
    models = {"subject": build.fingerprint(folder, preset.name), "control": build.fingerprint(base, "base")}
    exam = build.Exam(name=preset.name, attacks=())  # its identities; the judge writes the rest
    build.certificate(folder, exam, [], models["subject"], models["control"]).write(folder / "certificate.json")
    made: dict[str, list[AttackTrace]] = {"nothing": references_of(preset), "control": [], "subject": []}
    for trace in made["nothing"]:
        trace.write(folder / "traces" / "nothing" / trace.file_name)
    for role in ("control", "subject"):
        follow, efforts = None, {}
        if preset.adaptation is not None:
            after = AfterBase(preset, preset.attacks, made)
            efforts = after.efforts() if role == "subject" else {}
            follow = after if role == "subject" else OnBase(preset, preset.attacks, made["nothing"])
        for name in (*preset.attacks, *preset.trainability):
            benign = name in TRAINABILITY
            found = runs_of(name, role, models[role], preset, breaks, skipped, efforts.get(name, Effort()),
                            None if benign else follow)
            for trace in found:
                trace.write(folder / "traces" / role / trace.file_name)
            made[role] += found
    plan = plan_exam(preset, ATTACKS, TRAINABILITY, made)
    assert plan.protocol == preset.name
    certificate = judge_again(folder, plan, harmful_data=splits("harmful"), benign_data=splits("benign"),
                              files=loading_files(folder), provenance=provenance())
    assert certificate.expires > EXPIRES
    return folder


def without_references(folder: Path) -> Path:
    """The same exam as if nobody had asked what attackers reach without the model."""
    shutil.rmtree(folder / "traces" / "nothing")
    certificate = Certificate.read(folder / "certificate.json")
    judge_again(folder, certificate.plan.model_copy(update={"references": []}))
    return folder


def released_vit(root: Path) -> Path:
    """A standard exam that a tiny ViT withstands by formula; the weights are real, and load."""
    files = {path.name: path.read_bytes() for path in save_vit(root / "vit", 1).iterdir()}
    weights = files.pop("model.safetensors")
    folder = preset_exam(root / "exam", PROTOCOLS["standard"], (), (*NEEDS_BASE, "batchnorm_probe"), weights, files)
    return shutil.copytree(folder, root / "model")
