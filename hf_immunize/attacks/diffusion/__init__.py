"""Adversaries of diffusion models, on diffusers and PEFT alone: one file each, one plain table."""

from hf_immunize.attacks.diffusion import full_finetune, lora
from hf_immunize.attacks.diffusion.context import METRIC, DiffusionAttackContext
from hf_immunize.attacks.shape import Attack

DIFFUSION_ATTACKS: dict[str, Attack] = {
    "diffusion_lora": lora.ATTACK,
    "diffusion_full_finetune": full_finetune.ATTACK,
}

__all__ = ["DIFFUSION_ATTACKS", "METRIC", "DiffusionAttackContext"]
