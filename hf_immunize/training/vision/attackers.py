"""The simulated attackers of an image model: what their options allow, and what they hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_immunize.errors import ConfigError, ModelError
from hf_immunize.features import block_names, names_after_trunk
from hf_immunize.training.core.attack_terms import build_attack
from hf_immunize.training.core.draws import generator_of, same_draws
from hf_immunize.training.core.headed import build_headed, gain_below_chance
from hf_immunize.training.core.unrolled import UnrolledAttack
from hf_immunize.training.core.weight_terms import AttackedTask, WeightObjective, WeightTerm

_CHOICES = {"attacker_head": ("refitted", "fresh"), "attacker_norms": ("frozen", "batch")}
_SIMULATED = "harmful_simulated_attack"


def check_attacker(args: Any) -> None:
    """Raise ConfigError for options of simulated attackers that contradict each other, or that no objective reads."""
    for name, known in _CHOICES.items():
        if getattr(args, name) not in known:
            raise ConfigError(f"expected {name} in {list(known)}, got {getattr(args, name)!r}.")
    if args.attacker_resets < 0:
        raise ConfigError(f"expected attacker_resets of at least 0, got {args.attacker_resets}.")
    if args.attacker_resets and args.attacker_rank:
        raise ConfigError(
            "expected attacker_rank=0 with attacker_resets, got LoRA factors: they train beside weights that the "
            "defended model holds as well, which cannot be drawn anew. Turn one of them off."
        )
    own = {"attacker_head": args.attacker_head != "refitted", "attacker_depths": args.attacker_depths is not None,
           "attacker_second_order": args.attacker_second_order}  # fmt: skip
    if "simulated_attack" not in args.objectives and (found := [name for name, on in own.items() if on]):
        raise ConfigError(f"expected objective simulated_attack for {found[0]}, got {args.objective!r}: leave it out.")
    if sum(own.values()) > 1:
        raise ConfigError(
            f"expected one of {[name for name, on in own.items() if on]}, got several: a fresh head is judged at its "
            "own place, and the exact gradient is that of the head's error alone."
        )
    if args.attacker_second_order:
        _check_exact(args)


def _check_exact(args: Any) -> None:
    if args.world_size > 1:
        raise ConfigError(
            f"expected one process for attacker_second_order, got {args.world_size}: the head is refitted on the rows "
            "of all of them, whose second derivative is not exchanged. Leave it off."
        )
    if args.attacker_optimizers != "adamw":
        raise ConfigError(
            f"expected attacker_optimizers=adamw for attacker_second_order, got {args.attacker_optimizers!r}: its "
            "attacker steps with a smoothed AdamW. Leave one of them out."
        )


def build_attacker(term: WeightTerm, task: AttackedTask, args: Any) -> WeightObjective:
    """A term on the weights at work, by the options that describe its attacker."""
    if term.name != _SIMULATED:
        return term.build(task, args)
    if args.attacker_head == "fresh":
        return build_headed(gain_below_chance, task, args)
    if args.attacker_second_order:
        return build_attack(False, task, args, kind=UnrolledAttack)
    return term.build(task, args)


def fresh_blocks(model: nn.Module, most: int, head: str, seed: int) -> Callable[[int], Mapping[str, Tensor]] | None:
    """Given an optimizer step, weights drawn anew for the last n blocks and what follows them, n in 0..``most``.

    Drawn as the architecture draws them, from its config; the head stays. None for ``most`` 0.

    Raises:
        ModelError: fewer blocks, or a model whose architecture cannot be drawn again.
    """
    if not most:
        return None
    blocks = block_names(model)
    if most > len(blocks):
        raise ModelError(f"expected attacker_resets of at most {len(blocks)}, the model's blocks, got {most}.")
    if getattr(model, "config", None) is None:
        raise ModelError("expected a model of transformers for attacker_resets, got one without a config: set it to 0.")
    return partial(_drawn, model, blocks, [*names_after_trunk(model)], most, head, seed)


def _drawn(
    model: nn.Module, blocks: Sequence[str], after: Sequence[str], most: int, head: str, seed: int, step: int
) -> dict[str, Tensor]:
    count = int(torch.randint(most + 1, (1,), generator=generator_of(seed, "resets", step)))
    if not count:
        return {}
    with same_draws(torch.device("cpu"), seed, "reset weights", step):
        other: Any = type(model)
        found = other(model.config)
    ends = tuple(f"{name}." for name in [*blocks[len(blocks) - count :], *after])
    return {
        name: value.detach() for name, value in found.named_parameters()
        if name.startswith(ends) and not name.startswith(f"{head}.")
    }  # fmt: skip
