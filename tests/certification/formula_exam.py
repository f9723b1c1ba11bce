"""Exams whose curves are a formula: no model, real scheduling, and a truth that is known."""

from __future__ import annotations

import dataclasses
import math

from trace_builders import MODEL, data

from hf_immunize.attacks import ATTACKS, parse_settings, run_suite
from hf_immunize.attacks.core.shape import Result, evaluation_steps
from hf_immunize.attacks.diffusion import DIFFUSION_ATTACKS, METRIC
from hf_immunize.exam import PROTOCOLS
from hf_immunize.records import AttackTrace, Evaluation
from hf_immunize.stages.following import AfterBase, OnBase, adapting_attacks, read_base

FULL = {"quick": "full_finetune", "diffusion_quick": "diffusion_full_finetune",
        "diffusion_standard": "diffusion_full_finetune"}


@dataclasses.dataclass
class Formula:
    """An exam without a model: the good rate is 0.1, which the range does not have, and the model is slowed 5 times."""

    role: str
    tau: float = 60.0
    slowed: float = 5.0
    good: float = 0.1
    before: float = 0.0
    """Score before the attack."""
    device = "cpu"
    data = tuple(data())
    fingerprint = MODEL
    described = {"attack_fraction": 0.8}

    def holding(self, need):
        return None

    def run(self, context, runs):
        for run in runs:
            off = abs(math.log10(run.config.learning_rate / context.good))
            tau = context.tau * 3**off * (1 + 0.02 * run.seed) * (context.slowed if context.role == "subject" else 1)
            curve = [Evaluation(step=step, validation=(score := self.before + 0.9 * (1 - math.exp(-step / tau))),
                                test=score) for step in self.steps(run.config.steps)]
            yield run, Result(curve, run.config.steps, 0.1, samples=32 * run.config.steps)

    def steps(self, budget):
        return evaluation_steps(budget)


@dataclasses.dataclass
class Denoiser(Formula):
    """The same of a pipeline, whose attack is judged by what its score gains; curves begin before the attack."""

    tau: float = 150.0
    before: float = -0.5
    described = {"attack_fraction": 0.8, "metric": METRIC}

    def steps(self, budget):
        return [0, *evaluation_steps(budget)]


def sit(folder, role, after=None, share=None, protocol=PROTOCOLS["quick"], kind=Formula, **formula):
    """The traces of one side's exam by ``full_finetune``, its effort as the preset says."""
    context = kind(role, **formula)
    known = ATTACKS if protocol.name in PROTOCOLS else DIFFUSION_ATTACKS
    name, settings = FULL[protocol.name], parse_settings(protocol.settings, known)
    table = {name: dataclasses.replace(known[name], run=context.run)}
    names = adapting_attacks(protocol, table, [name], settings, protocol.trials)
    assert names == (name,)
    if role == "control":
        efforts, follow, decided = {}, OnBase(protocol, names, []), None
    else:
        found = AfterBase(protocol, names, read_base(after))
        efforts, follow, decided = found.efforts(), found, found.decided
    run_suite(context, table, [name], protocol.seeds, folder, settings, trials=protocol.trials,
              tuning_seeds=protocol.tuning_seeds, efforts=efforts, follow=follow, decided=decided,
              share=share)
    return [AttackTrace.read(path) for path in sorted((folder / "traces" / role).glob("*.json"))]
