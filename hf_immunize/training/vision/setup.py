"""The terms of a run at work: on features at the sites, on weights through a simulated attacker."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_immunize.errors import DataError
from hf_immunize.features import linear_sites
from hf_immunize.training.core.balancing import check_numbers, numbers_of
from hf_immunize.training.core.draws import same_draws
from hf_immunize.training.core.meter import Meter
from hf_immunize.training.core.objective import GlobalObjective
from hf_immunize.training.core.preconditioning import Preconditioner
from hf_immunize.training.core.registry import AnyTerm, on_features, on_weights
from hf_immunize.training.core.step import Step
from hf_immunize.training.core.terms import IMMA, Rows, TermSettings, imma_training_loss
from hf_immunize.training.core.weight_terms import AttackedTask, WeightTerms
from hf_immunize.training.vision.attackers import build_attacker, fresh_blocks
from hf_immunize.training.vision.config import ImmunizationConfig
from hf_immunize.training.vision.forwards import Forwards
from hf_immunize.training.vision.harmful_loss import CHANCE, refitted_answers_loss, refitted_head_loss
from hf_immunize.training.vision.harmful_task import HarmfulTask
from hf_immunize.training.vision.lora_attacker import LoraAttacker
from hf_immunize.training.vision.norms import frozen_statistics


def attacker_of(args: ImmunizationConfig, model: nn.Module, head: str) -> LoraAttacker | None:
    """The attacker of ``imma`` with LoRA factors; None where none is asked for."""
    if not args.attacker_rank or "imma" not in args.objectives:
        return None
    return LoraAttacker(model, head, rank=args.attacker_rank, rate=args.attacker_learning_rate, seed=args.seed)


def preconditioner_of(args: ImmunizationConfig, model: nn.Module) -> Preconditioner | None:
    """What preconditions gradients; None where none is asked for."""
    patterns = args.precondition_gradients
    return Preconditioner(model, patterns, args.precondition_ridge) if patterns else None


def settings_of(args: ImmunizationConfig, harmful_classes: int | None) -> TermSettings:
    """The options that terms on features depend on."""
    return TermSettings(
        horizons=args.horizons,
        memorization=args.memorization,
        group_rows=args.harmful_group_rows,
        attacker_steps=args.attacker_steps,
        harmful_classes=harmful_classes,
    )


def build_step(
    args: ImmunizationConfig,
    terms: Sequence[AnyTerm],
    settings: TermSettings,
    site_weights: Mapping[str, float],
    task: AttackedTask,
    preconditioner: Preconditioner | None,
    meter: Meter,
) -> Step:
    """The step of a run with these terms."""
    check_numbers(args, terms)
    objective, at_work = None, None
    if found := on_features(terms):
        objective = GlobalObjective(
            found, settings, site_weights, strength=args.strength, bank_rows=args.feature_bank_rows, meter=meter,
            **numbers_of(args, found),
        )
    if held := on_weights(terms):
        attackers = {term: build_attacker(term, task, args) for term in held}
        for attacker in attackers.values():
            attacker.ceiling = CHANCE
        at_work = WeightTerms(attackers, strength=args.strength, **numbers_of(args, held))
    return Step(objective, at_work, meter, preconditioner=preconditioner)


def refitted_error(found: Tensor, rows: dict[str, Any], classes: int | None, args: ImmunizationConfig) -> Tensor:
    """The error on rows N×D of the refitted head that generalises best, which an attacker would take."""

    def at(horizon: float) -> Tensor:
        if "answers" in rows:
            return refitted_answers_loss(found, rows["answers"].cpu(), horizon, exact=args.attacker_second_order)
        assert classes is not None  # else there are answers
        return refitted_head_loss(found, rows["labels"].cpu(), horizon, classes, exact=args.attacker_second_order)

    return torch.stack([at(horizon) for horizon in args.horizons]).min()


def attacked_task(
    forwards: Forwards, model: nn.Module, batch: Callable[[int], dict[str, Any]], task: HarmfulTask,
    depths: Sequence[str] = (),
) -> AttackedTask:
    """The error of a refitted head on harmful rows, of any copy of the model; ``task.asks`` says what it answers.

    Args:
        depths: layers at whose inputs the defender holds that error up, in the place of the head's alone.
    """
    args = forwards.args
    layers = linear_sites(model, "lora", forwards.head) if args.attacker_rank and args.objective != "imma" else []

    def at(names: Sequence[str], attacked: nn.Module, step: int, attack_step: int) -> tuple[list[Tensor], Any]:
        rows = batch(step * (args.attacker_steps + 1) + attack_step)
        forwards.hold(attacked)
        with same_draws(args.device, args.seed, "attack", step, attack_step, args.process_index):
            return forwards.attacked(attacked, rows, names), rows

    def features(attacked: nn.Module, step: int, attack_step: int) -> tuple[Tensor, Tensor, int]:
        (found,), rows = at([forwards.head], attacked, step, attack_step)
        if task.classes is None:
            raise DataError(
                "expected one class for each harmful row for an attacker with a head of his own, got none: choose "
                "simulated_attack with attacker_head=refitted."
            )
        return found, rows["labels"], task.classes

    def loss(attacked: nn.Module, step: int, attack_step: int) -> Tensor:
        (found,), rows = at([forwards.head], attacked, step, attack_step)
        return refitted_error(found, rows, task.classes, args)

    def harm(attacked: nn.Module, step: int, attack_step: int) -> Tensor:
        found, rows = at(depths, attacked, step, attack_step)
        errors = [refitted_error(part, rows, task.classes, args) for part in found]
        return torch.relu(CHANCE - torch.stack(errors)).mean()

    fresh = fresh_blocks(model, args.attacker_resets, forwards.head, args.seed)
    return AttackedTask(model, layers, loss, args.seed, features, harm if depths else None, fresh)


def learn_attack(
    attacker: LoraAttacker,
    forwards: Forwards,
    objective: GlobalObjective,
    bare: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    step: int,
) -> Tensor:
    """One step of imma's LoRA updates on the harmful rows of the coming optimizer step; its loss before."""
    (site,) = objective.sites
    bare.train()
    forwards.hold(bare)

    def forward(place: int, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        with forwards.same_draws(step, place), attacker.attached(bare, learning=True):
            features = forwards.at_head(bare, inputs)
            return features, torch.tensor(inputs["classes"])  # on the CPU, where reading them waits for nothing

    def loss_of(rows: Rows) -> Tensor:
        rows.memory = objective.memory[site].get(IMMA.name, {})
        return imma_training_loss(rows, objective.settings)

    with frozen_statistics(bare, every=True):
        runs = [partial(forward, place, harmful) for place, harmful in enumerate(batches)]
        return attacker.learn(runs, loss_of)
