"""Adversaries of diffusion models, on diffusers and PEFT alone: one file each, one plain table."""

from dataclasses import replace

from hf_immunize.attacks.diffusion import data_shifts, dreambooth, full_finetune, lora, textual_inversion
from hf_immunize.attacks.diffusion.context import METRIC, DiffusionAttackContext
from hf_immunize.attacks.shape import Attack

DIFFUSION_ATTACKS: dict[str, Attack] = {
    "diffusion_lora": lora.ATTACK,
    "diffusion_full_finetune": full_finetune.ATTACK,
    "diffusion_dreambooth": dreambooth.ATTACK,
    "diffusion_dreambooth_prior": dreambooth.PRIOR,
    "diffusion_textual_inversion": textual_inversion.ATTACK,
    "diffusion_perturbed_images": data_shifts.PERTURBED,
    "diffusion_other_images": data_shifts.OTHER_IMAGES,
    "diffusion_other_prompts": data_shifts.OTHER_NAME,
    "diffusion_placeholder_token": data_shifts.PLACEHOLDER,
    "diffusion_generic_prompt": data_shifts.GENERIC,
}

DIFFUSION_TRAINABILITY: dict[str, Attack] = {
    f"benign_{name}": replace(DIFFUSION_ATTACKS[name], family="benign trainability")
    for name in ("diffusion_lora", "diffusion_full_finetune")
}
"""No attacks: how a benign concept would be learned, which immunization must not hinder."""

__all__ = ["DIFFUSION_ATTACKS", "DIFFUSION_TRAINABILITY", "METRIC", "DiffusionAttackContext"]
