"""LoRA through PEFT: the cheapest way most people fine-tune."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_immunize.attacks._finetune import FinetuneConfig, run_finetunes
from hf_immunize.attacks.context import AttackContext
from hf_immunize.attacks.shape import Attack, Result, Run

ATTENTION = r".*attention.*\.(q_proj|v_proj|query|value)"
"""Query and value projections, under their present and their former names."""


@dataclass(frozen=True)
class Lora(FinetuneConfig):
    """AdamW on low-rank updates of the targeted layers, and on a new head for the harmful classes."""

    rank: int = field(default=8, metadata={"help": "Rank of each update."})
    alpha: int = field(default=16, metadata={"help": "Updates are scaled by alpha/rank."})
    targets: str | None = field(
        default=None,
        metadata={
            "help": "Regular expression over module names. By default attention query and value projections; where "
            "there are none, every linear layer but the head; where there are none, every convolution."
        },
    )


def target_modules(model: nn.Module, head: str, pattern: str | None) -> list[str]:
    """Full names of the layers to adapt, the head left out; an empty list when the model has none."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != head]
    convolutions = [
        name for name, module in model.named_modules() if isinstance(module, nn.Conv2d) and module.groups == 1
    ]
    if pattern is not None:
        return [name for name in linear + convolutions if re.fullmatch(pattern, name)]
    return [name for name in linear if re.fullmatch(ATTENTION, name)] or linear or convolutions


def run(context: AttackContext, runs: Sequence[Run]) -> Iterator[tuple[Run, Result]]:
    """One Trainer per run."""
    yield from run_finetunes(context, runs, _prepare)


def _prepare(context: AttackContext, planned: Run) -> nn.Module | str:
    config, seed = planned.config, planned.seed
    model = context.model_with_new_head(seed)
    targets = target_modules(model, context.head, config.targets)
    if not targets:
        return f"LoRA found no linear layer or convolution to adapt (targets={config.targets!r})"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets))
    for parameter in adapted.get_submodule(f"base_model.model.{context.head}").parameters():
        parameter.requires_grad_(True)
    return adapted


ATTACK = Attack(config=Lora, run=run, family="LoRA")
