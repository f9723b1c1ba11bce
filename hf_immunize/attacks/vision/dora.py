"""DoRA through PEFT: LoRA on directions, with trained magnitudes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hf_immunize.attacks.core.shape import setting
from hf_immunize.attacks.vision.lora import ATTACK as LORA
from hf_immunize.attacks.vision.lora import VARIANTS, Lora


@dataclass(frozen=True)
class Dora(Lora):
    """LoRA whose updates are decomposed into direction and magnitude (Liu et al. 2024)."""

    variant: str = setting("dora", f"One of {', '.join(VARIANTS)}.")


ATTACK = replace(LORA, config=Dora)
