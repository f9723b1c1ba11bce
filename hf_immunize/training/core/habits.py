"""A simulated attacker's optimizer and rate, drawn anew for every attack: else a defence is one against one setting."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_immunize.errors import ConfigError
from hf_immunize.training.core.draws import generator_of

SGD_FACTOR = 100.0
"""Rate of SGD with momentum over AdamW's: 0.1 and 1e-3 are what people take."""
OPTIMIZERS = ("adamw", "sgd")


@dataclass(frozen=True)
class Habits:
    """Which optimizers an attacker draws from, and from how many decades around his rate.

    Args:
        rate: of AdamW, in the middle of the decades; that of SGD is ``SGD_FACTOR`` times as large.
        optimizers: names in ``OPTIMIZERS``.
        decades: width on a log scale; 0 for the rate itself.
    """

    rate: float
    optimizers: tuple[str, ...] = ("adamw",)
    decades: float = 0.0

    @property
    def fixed(self) -> bool:
        """Whether nothing is drawn and AdamW is used."""
        return self.optimizers == ("adamw",) and self.decades == 0

    def draw(self, *words: object) -> tuple[str, float]:
        """Optimizer and rate of the attack that ``words`` name; the same on every rank."""
        if self.fixed:
            return "adamw", self.rate
        first, second = torch.rand(2, generator=generator_of(*words, "habits"), dtype=torch.float64).tolist()
        name = self.optimizers[int(first * len(self.optimizers))]
        factor = SGD_FACTOR if name == "sgd" else 1.0
        return name, self.rate * factor * 10 ** ((second - 0.5) * self.decades)

    def optimizer(self, parameters: Iterable[nn.Parameter], *words: object) -> torch.optim.Optimizer:
        """What the attacker of these words steps with."""
        name, rate = self.draw(*words)
        if name == "sgd":
            return torch.optim.SGD(parameters, lr=rate, momentum=0.9)
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)


def habits_of(args: Any) -> Habits:
    """The habits that the options describe. Raises ConfigError for an optimizer that there is not."""
    names = tuple(name.strip() for name in str(args.attacker_optimizers).split(","))
    if unknown := [name for name in names if name not in OPTIMIZERS]:
        raise ConfigError(f"expected attacker_optimizers among {list(OPTIMIZERS)}, joined with commas, got {unknown}.")
    return Habits(args.attacker_learning_rate, names, args.attacker_rate_decades)
