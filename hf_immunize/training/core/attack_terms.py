"""Simulated attacks as terms on the weights, by the options that describe the attacker."""

from __future__ import annotations

from functools import partial

from hf_immunize.training.core.options import ImmunizationOptions
from hf_immunize.training.core.simulated import SimulatedAttack
from hf_immunize.training.core.unrolled import UnrolledAttack
from hf_immunize.training.core.weight_terms import AttackedTask, WeightTerm


def _build(goes_on: bool, task: AttackedTask, args: ImmunizationOptions) -> SimulatedAttack:
    kind = UnrolledAttack if getattr(args, "attacker_second_order", False) else SimulatedAttack
    steps = 1 if goes_on else args.attacker_steps
    return kind(
        task, steps=steps, learning_rate=args.attacker_learning_rate, rank=args.attacker_rank, goes_on=goes_on
    )


SIMULATED_TERM = WeightTerm("harmful_simulated_attack", partial(_build, False))
IMMA_TERM = WeightTerm(SIMULATED_TERM.name, partial(_build, True))
"""The attacker of IMMA, whose factors go on from step to step."""
