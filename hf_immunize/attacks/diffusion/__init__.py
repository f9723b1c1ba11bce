"""Adversaries of diffusion models, on diffusers and PEFT alone: one file each, one plain table."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from hf_immunize.attacks.core.shape import Attack, Result, Run
from hf_immunize.attacks.diffusion import data_shifts, dreambooth, full_finetune, lora, textual_inversion
from hf_immunize.attacks.diffusion.context import METRIC, DiffusionAttackContext
from hf_immunize.diffusion import fits_memory

_SMALLER = "lower the attack's batch_size or eval_batch_size, or take another device"


def guarded(attack: Attack) -> Attack:
    """The attack, with any lack of memory on its way as a typed error."""

    def run(context: DiffusionAttackContext, runs: Sequence[Run]) -> Iterator[tuple[Run, Result]]:
        with fits_memory("an attacker's run", _SMALLER):
            yield from attack.run(context, runs)

    return replace(attack, run=run)


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
DIFFUSION_ATTACKS = {name: guarded(attack) for name, attack in DIFFUSION_ATTACKS.items()}

DIFFUSION_TRAINABILITY: dict[str, Attack] = {
    f"benign_{name}": replace(DIFFUSION_ATTACKS[name], family="benign trainability")
    for name in ("diffusion_lora", "diffusion_full_finetune")
}
"""No attacks: how a benign concept would be learned, which immunization must not hinder."""

__all__ = ["DIFFUSION_ATTACKS", "DIFFUSION_TRAINABILITY", "METRIC", "DiffusionAttackContext", "guarded"]
