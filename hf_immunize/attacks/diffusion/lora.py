"""LoRA on a denoiser's attention projections through PEFT, as diffusers' training examples do it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from hf_immunize.attacks.diffusion._finetune import DiffusionFinetune, run_finetunes
from hf_immunize.attacks.diffusion.context import DiffusionAttackContext
from hf_immunize.attacks.shape import Attack, Result, Run


@dataclass(frozen=True)
class DiffusionLora(DiffusionFinetune):
    """AdamW on low-rank updates of the attention projections."""

    rank: int = field(default=8, metadata={"help": "Rank of each update."})
    alpha: int = field(default=8, metadata={"help": "Updates are scaled by alpha/rank."})


def run(context: DiffusionAttackContext, runs: Sequence[Run]) -> Iterator[tuple[Run, Result]]:
    """One loop per run."""
    yield from run_finetunes(context, runs, adapted)


def adapted(context: DiffusionAttackContext, planned: Run) -> nn.Module:
    """The attacked denoiser with adapters drawn from the run's seed; nothing else is trained."""
    model = context.model(planned.seed).requires_grad_(False)
    config = LoraConfig(
        r=planned.config.rank,
        lora_alpha=planned.config.alpha,
        init_lora_weights="gaussian",
        target_modules=list(context.denoiser.attention),
    )
    with torch.random.fork_rng():
        torch.manual_seed(planned.seed)
        return inject_adapter_in_model(config, model)


ATTACK = Attack(config=DiffusionLora, run=run, family="LoRA", own_threshold=True)
