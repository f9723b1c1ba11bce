"""Simulated attacks as terms on the weights, by the options that describe the attacker."""

from __future__ import annotations

from functools import partial

from hf_immunize.training.core.habits import habits_of
from hf_immunize.training.core.options import ImmunizationOptions
from hf_immunize.training.core.simulated import SimulatedAttack
from hf_immunize.training.core.weight_terms import AttackedTask, WeightTerm


def build_attack(
    goes_on: bool, task: AttackedTask, args: ImmunizationOptions, kind: type[SimulatedAttack] = SimulatedAttack
) -> SimulatedAttack:
    """The attack that the options describe; ``goes_on``: as in IMMA."""
    steps = 1 if goes_on else args.attacker_steps
    return kind(task, steps=steps, habits=habits_of(args), rank=args.attacker_rank, goes_on=goes_on)


SIMULATED_TERM = WeightTerm("harmful_simulated_attack", partial(build_attack, False))
IMMA_TERM = WeightTerm(SIMULATED_TERM.name, partial(build_attack, True))
"""The attacker of IMMA, whose factors go on from step to step."""
