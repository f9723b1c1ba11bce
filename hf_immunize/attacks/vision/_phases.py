"""Training one part of the trunk after the other, from the input side."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from hf_immunize.features import block_names


class _Phases:
    """Before every training step, lets the part train whose turn it is (and the head); later, everything."""

    def __init__(self, parts: list[list[nn.Parameter]], always: list[nn.Parameter], steps: int):
        self.parts, self.always, self.steps = parts, always, steps

    def __call__(self, step: int) -> None:
        """``step`` is the number of steps that were taken."""
        turn = len(self.parts) * step // self.steps if step < self.steps else None
        for place, part in enumerate(self.parts):
            for parameter in part:
                parameter.requires_grad_(turn is None or place == turn)
        for parameter in self.always:
            parameter.requires_grad_(True)


def from_the_input(model: nn.Module, head: str, config: Any) -> nn.Module:
    """``model``, whose first steps train its blocks part by part; what lies outside the trunk belongs to its ends.

    Raises:
        ModelError: the model has no list of blocks.
    """
    blocks = block_names(model)
    count = min(config.parts, len(blocks))
    part_of = {name: place * count // len(blocks) for place, name in enumerate(blocks)}
    parts: list[list[nn.Parameter]] = [[] for _ in range(count)]
    always = list(model.get_submodule(head).parameters())
    ahead = True
    for name, parameter in model.named_parameters():
        block = next((block for block in blocks if name.startswith(f"{block}.")), None)
        ahead = ahead and block is None
        if not name.startswith(f"{head}."):
            parts[part_of[block] if block else 0 if ahead else count - 1].append(parameter)
    steps = max(count, math.ceil(config.share * config.steps))
    told: Any = model  # AttackTrainer asks for it
    told.before_step = _Phases(parts, always, steps)
    return model
