"""Attacks of plug-ins as evidence: believed where the same code is installed here, and refused everywhere else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from hf_immunize.errors import RecordError
from hf_immunize.plugins import load_plugins
from hf_immunize.records import AttackTrace, Plan

if TYPE_CHECKING:
    from hf_immunize.attacks import Attack

_WHERE = "install it (pip install), or name its file in HF_IMMUNIZE_PLUGINS"


def attack_tables() -> Mapping[str, Attack]:
    """Every attack, reference and way of learning a benign task, of pipelines too where diffusers is there."""
    from hf_immunize.attacks import ATTACKS, REFERENCES, TRAINABILITY

    known: dict[str, Attack] = {**ATTACKS, **REFERENCES, **TRAINABILITY}
    try:
        from hf_immunize.attacks.diffusion import DIFFUSION_ATTACKS, DIFFUSION_TRAINABILITY
    except ImportError:
        return known
    return known | DIFFUSION_ATTACKS | DIFFUSION_TRAINABILITY


def plugin_problem(name: str, digest: str | None, table: Mapping[str, Attack], whose: str = "a plug-in") -> str | None:
    """Why evidence of an attack cannot be judged here, in words; None where it can.

    Args:
        digest: SHA-256 of the plug-in's source that the evidence tells of; None: an attack of this package.
        table: attacks by name, which a plug-in that is imported now may add to.
        whose: name of the plug-in, where it is known.

    Raises:
        ConfigError: a plug-in that is installed here and cannot be imported.
    """
    if name not in table:
        load_plugins()
    if name not in table:
        if digest is None:
            return f"the attack {name!r} is none of this release, and no plug-in is told to be behind it"
        return f"the attack {name!r} is one of {whose}, which is not here: {_WHERE} to judge what rests on it"
    known = table[name].plugin
    if digest == (None if known is None else known.sha256):
        return None
    if known is None:
        return f"the attack {name!r} is one of {whose} there, but one of this package here"
    if digest is None:
        return f"the attack {name!r} is one of the plug-in {known.name} here, but not in the evidence"
    return (
        f"the attack {name!r} is one of {whose} with the source {digest[:12]}…, here is {known.name} with "
        f"{known.sha256[:12]}…: {_WHERE} in the version of the exam"
    )


def plan_problems(plan: Plan) -> list[str]:
    """What ``plugin_problem`` finds of each plug-in's attack in a plan; nothing is imported for a plan without any."""
    foreign = [(item.attack, item.plugin) for item in plan.attacks if item.plugin is not None]
    if not foreign:
        return []
    load_plugins()
    table = attack_tables()
    found = [plugin_problem(name, plugin.sha256, table, f"the plug-in {plugin.name}") for name, plugin in foreign]
    return [problem for problem in found if problem is not None]


def refuse_other_code(trace: AttackTrace, table: Mapping[str, Attack], where: str) -> None:
    """Raise RecordError for a trace of an attack whose code is not here, or is another here."""
    told = trace.config.get("plugin")
    problem = plugin_problem(trace.attack, None if told is None else str(told), table)
    if problem is not None:
        raise RecordError(f"expected a trace of an attack that is known here, got another in {where}: {problem}.")
