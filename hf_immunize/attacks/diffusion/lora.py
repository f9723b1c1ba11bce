"""LoRA on a denoiser's attention projections through PEFT, as diffusers' training examples do it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from hf_immunize.attacks.core.shape import Attack, Run, setting
from hf_immunize.attacks.diffusion._finetune import DiffusionFinetune, run_finetunes
from hf_immunize.attacks.diffusion.context import DiffusionAttackContext


@dataclass(frozen=True)
class DiffusionLora(DiffusionFinetune):
    """AdamW on low-rank updates of the attention projections."""

    rank: int = setting(8, "Rank of each update.")
    alpha: int = setting(8, "Updates are scaled by alpha/rank.")


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


ATTACK = Attack(
    config=DiffusionLora, run=partial(run_finetunes, prepare=adapted), family="LoRA", own_threshold=True,
    covers="a defence that counts on all weights being trained",
)
