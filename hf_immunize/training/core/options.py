"""Options that both trainers have, under one name each."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_immunize.errors import ConfigError
from hf_immunize.training.core.habits import habits_of


@dataclass
class ImmunizationOptions:
    """What is immunized against, how hard, and what holds the primary task; explained in each option's help text."""

    objective: str = field(
        default="condition_number",
        metadata={
            "help": "What makes harmful fine-tuning slow. On features at `sites`: condition_number (R_ill on harmful "
            "and R_well on primary features, Zheng et al. 2025), ill_only (R_ill), opt_kappa (-log kappa on harmful, "
            "+log kappa on primary), group_kappa (-log kappa, mean over small groups of harmful rows), "
            "closed_form_adversary (held-out R2 of a ridge probe). On weights: simulated_attack (the bounded loss an "
            "attacker has after attacker_steps steps). imma (an attacker that goes on from step to step, Zheng & Yeh "
            "2024). Other defences', for image models (docs/objectives.md): sophon_ice, sophon_klu, tar_entropy (on "
            "weights), rep_noise, trap (on features); resalign_moreau (on weights, pipelines too); esd and "
            "meta_unlearning (on weights, for pipelines). Several are joined with '+'."
        },
    )
    weight: str = field(
        default="auto",
        metadata={
            "help": "Weight of each term. 'auto' balances gradient norms: every term pushes with strength x the "
            "gradient norm of a fully wrong primary batch. A number, or term=number pairs joined with commas, fixes "
            "the weights; strength is then a plain factor."
        },
    )
    strength: float = field(
        default=0.5,
        metadata={
            "help": "The one knob: factor on all immunization terms. 0 turns them off. With max_primary_drop it is "
            "where the strength starts; without, lower it where the primary task loses too much."
        },
    )
    term_shares: str | None = field(
        default=None,
        metadata={"help": "Relative strength of single terms, e.g. 'primary_r_well=0.1'; 1 if not named."},
    )
    sites: str = field(
        default="head",
        metadata={
            "help": "Layers whose inputs are regularized: head, lora (query and value projections, else every linear "
            "layer but the head), or module names as for trainable_modules. Tokens, positions and windows are averaged."
        },
    )
    site_layouts: str | None = field(
        default=None,
        metadata={
            "help": "Axes of single sites' inputs where they should not be found, e.g. 'attention.q_proj=(n k) t d': n "
            "images, d features, all else is averaged; (n k): k windows per image; 'n 0 d': the first token alone."
        },
    )
    trainable_modules: str | None = field(
        default=None,
        metadata={
            "help": "What is trained; all else is frozen and runs without autograd, in evaluation mode. Names or "
            "dotted ends of names joined with commas, one regular expression over whole names, or 'last:N' for the "
            "trunk's last N stages (a ViT's blocks) and all that follows it. Default: whatever requires a gradient."
        },
    )
    horizon: str = field(
        default="30,300,3000",
        metadata={
            "help": "closed_form_adversary: steps t of the simulated gradient-descent probe (ridge penalty sigma_1/t). "
            "Choose it so that the held-out R2 starts above 0. Several, joined with commas, are averaged."
        },
    )
    harmful_group_rows: int = field(
        default=32,
        metadata={
            "help": "group_kappa: rows per group. n centred rows span n-1 directions, those of the most energy, so "
            "that small groups raise kappa along the directions an attacker uses first."
        },
    )
    attacker_steps: int = field(
        default=4, metadata={"help": "simulated_attack: steps an attacker takes; imma: its steps per step of ours."}
    )
    attacker_rank: int = field(
        default=0,
        metadata={
            "help": "simulated_attack, imma: rank of the LoRA factors on attention that the attacker trains. 0: no "
            "factors; simulated_attack then trains all weights, in a copy of them."
        },
    )
    attacker_learning_rate: float = field(
        default=1e-3, metadata={"help": "simulated_attack, imma: the attacker's learning rate (AdamW)."}
    )
    attacker_optimizers: str = field(
        default="adamw",
        metadata={
            "help": "Objectives with simulated attackers, but imma: what the attacker of a step draws his optimizer "
            "from: adamw, sgd (momentum 0.9, a hundred times the rate), or adamw,sgd."
        },
    )
    attacker_rate_decades: float = field(
        default=0.0,
        metadata={"help": "The same: his rate is drawn from this many decades around attacker_learning_rate; 0: it."},
    )
    primary_loss_weight: float = field(
        default=1.0, metadata={"help": "Weight of the primary task's own loss; 0 trains on distillation alone."}
    )
    distillation: float = field(
        default=0.0,
        metadata={"help": "Weight of the distance to the answers of the model before immunization on primary rows."},
    )
    max_primary_drop: float | None = field(
        default=None,
        metadata={
            "help": "Largest loss of the primary metric against the model before immunization, in points, on "
            "eval_dataset. The trainer lowers the strength when it is exceeded, raises it when there is room, and "
            "returns the last weights that kept it."
        },
    )
    max_strength_factor: float = field(
        default=8.0, metadata={"help": "How far above `strength` the guard may raise it while there is room."}
    )
    ema_decay: float = field(
        default=0.0,
        metadata={
            "help": "Decay of a moving average of the trained weights, evaluated, guarded and returned. 0: off."
        },
    )
    per_device_harmful_batch_size: int = field(
        default=128, metadata={"help": "Harmful rows per device and micro-batch; spectra are of the global batch."}
    )

    @property
    def horizons(self) -> tuple[float, ...]:
        """``horizon`` as numbers. Raises ConfigError for other text."""
        try:
            found = tuple(float(part) for part in str(self.horizon).split(","))
        except ValueError as error:
            raise ConfigError(f"expected horizon like '100' or '30,1000', got {self.horizon!r}.") from error
        if not all(horizon > 0 for horizon in found):
            raise ConfigError(f"expected a positive horizon in steps, got {self.horizon}.")
        return found

    @property
    def objectives(self) -> list[str]:
        """The names that ``objective`` joins. Raises ConfigError for an empty one."""
        names = [name.strip() for name in self.objective.split("+")]
        if not all(names):
            raise ConfigError(f"expected objectives joined with '+', got {self.objective!r}.")
        return names

    def check_options(self) -> None:
        """Raise ConfigError for values no run can use."""
        at_least = {name: 0 for name in ("strength", "primary_loss_weight", "distillation", "attacker_learning_rate")}
        at_least |= {"attacker_rank": 0, "attacker_steps": 1, "harmful_group_rows": 1, "max_strength_factor": 1}
        refuse_below(self, at_least | {"per_device_harmful_batch_size": 1})
        refuse_below(self, {"attacker_rate_decades": 0})
        if not habits_of(self).fixed and "imma" in self.objectives:
            raise ConfigError(
                "expected attacker_optimizers=adamw and attacker_rate_decades=0 with imma, whose attacker goes on from "
                "step to step, got others: leave them out, or choose simulated_attack."
            )
        refuse_below(self, {"harmful_group_rows": 3})  # two rows span one direction, which has no condition
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"expected ema_decay in [0, 1), got {self.ema_decay}: 1 would never move.")
        if self.max_primary_drop is not None and not 0 <= self.max_primary_drop < float("inf"):
            raise ConfigError(
                f"expected max_primary_drop of at least 0 points, and finite, got {self.max_primary_drop}."
            )
        assert self.horizons and self.objectives


def refuse_below(options: Any, at_least: Mapping[str, float]) -> None:
    """Raise ConfigError for an option under its least value, or that is not a number; None is still open."""
    for name, least in at_least.items():
        value = getattr(options, name)
        if value is not None and not value >= least:
            raise ConfigError(f"expected {name} of at least {least}, got {value}.")


def rename_option(options: Any, old: str, new: str, unset: Any = None) -> None:
    """Take the value of an option under its old name, and say so.

    Raises:
        ConfigError: both names are set.
    """
    value, fresh = getattr(options, old), type(options).__dataclass_fields__[new].default
    if value == unset:
        return
    if getattr(options, new) not in (fresh, value):
        raise ConfigError(f"expected {new} or its old name {old}, got both: leave {old} out.")
    warnings.warn(f"{old} is now called {new}; the old name goes with version 1.0.", FutureWarning, stacklevel=4)
    setattr(options, new, value)
    setattr(options, old, unset)
