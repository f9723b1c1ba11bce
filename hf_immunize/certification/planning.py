"""The plan of an exam as it lies in its certificate: what its preset asks for, and what was run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hf_immunize.certification.cells import Described
from hf_immunize.exam import DIFFUSION_PROTOCOLS, PROTOCOLS, Protocol
from hf_immunize.exam.means import Means
from hf_immunize.exam.presets import CUSTOM, asked_budget, run_departures
from hf_immunize.records import AttackTrace, Plan, PlannedAttack

SIDES = ("subject", "control", "scratch", "nothing", "alternative")


def plan_exam(
    protocol: Protocol,
    attacks: Mapping[str, Described],
    methods: Mapping[str, Described],
    traces: Mapping[str, Sequence[AttackTrace]],
    threshold: float | None = None,
) -> Plan:
    """The plan with every attack that the preset has or that was run on any side.

    Args:
        attacks, methods: tables of the attacks and of the methods by which a benign task is learned.
        threshold: harmful score that counts as success, where it is given by hand.
    """
    run = {trace.attack for found in traces.values() for trace in found}
    plan = _asked(protocol).model_copy(update={
        "threshold": threshold,
        "attacks": [
            _described(name, about).model_copy(update={"adapts": _adapts(protocol, name, traces)})
            for name, about in attacks.items() if name in run or name in protocol.attacks
        ],
        "methods": [_described(name, about) for name, about in methods.items()],
        "references": [
            PlannedAttack(attack=name, family=trace.family, unit=trace.unit)
            for name, trace in {trace.attack: trace for trace in traces.get("nothing", ())}.items()
        ],
    })
    plan = with_runs(plan, traces)
    # what departs from a preset does not go by its name
    return plan.model_copy(update={"protocol": CUSTOM}) if run_departures(plan, traces) else plan


def _adapts(protocol: Protocol, name: str, traces: Mapping[str, Sequence[AttackTrace]]) -> bool:
    """Whether an attack's effort follows the base: its preset says so, it began with the preset's budget, and nobody
    asked that it stay there."""
    runs = [trace for trace in traces.get("control", ()) if trace.attack == name]
    if protocol.adaptation is None or not runs or any(trace.config.get("adapts") is False for trace in runs):
        return False
    return min(trace.budget for trace in runs) == asked_budget(protocol.name, name)


def with_runs(plan: Plan, traces: Mapping[str, Sequence[AttackTrace]]) -> Plan:
    """The plan with the seeds, trials, budgets and means that these traces tell of."""
    first = next((trace for trace in traces.get("subject", ())), None)
    return plan.model_copy(update={
        "means": {} if first is None else Means.of(first.config).described
    } | {
        part: [_filled(item, traces.get(role, ())) for item in getattr(plan, part)]
        for part, role in (("attacks", "subject"), ("methods", "subject"), ("references", "nothing"))
    })


def plan_differences(plan: Plan) -> list[str]:
    """Names of the fields in which a plan is not what this release's preset of its name asks for.

    A plan by a name that is none of the presets differs in ``protocol``.
    """
    presets = PROTOCOLS | DIFFUSION_PROTOCOLS
    if plan.protocol not in presets:
        return ["protocol"]
    asked = _asked(presets[plan.protocol])
    names = ("planned", "seeds", "settings", "trials", "tuning_seeds", "trainability", "adaptation", "search")
    found = [name for name in names if getattr(plan, name) != getattr(asked, name)]
    listed = {item.attack for item in plan.attacks}
    return [*found, *(["attacks"] if not set(asked.planned) <= listed else [])]


def _asked(protocol: Protocol) -> Plan:
    return Plan(
        protocol=protocol.name, planned=list(protocol.attacks), seeds=list(protocol.seeds),
        settings=list(protocol.settings), trials=protocol.trials, tuning_seeds=protocol.tuning_seeds,
        trainability=list(protocol.trainability), adaptation=protocol.adaptation,
        search=protocol.search,
    )


def _described(name: str, about: Described) -> PlannedAttack:
    return PlannedAttack(attack=name, family=about.family, unit=about.unit, plugin=about.plugin)


def _filled(item: PlannedAttack, traces: Sequence[AttackTrace]) -> PlannedAttack:
    """One attack with what was run of it."""
    runs = [trace for trace in traces if trace.attack == item.attack]
    tuning = next((trace.config["tuning_seeds"] for trace in runs if trace.config.get("tuning_seeds")), [])
    return item.model_copy(update={
        "seeds": sorted({trace.seed for trace in runs}), "trials": sorted({trace.trial for trace in runs}),
        "tuning_seeds": tuning if isinstance(tuning, list) else [],
        "budget": max((trace.budget for trace in runs), default=0),
    })
