"""DoRA through PEFT: LoRA on directions, with trained magnitudes."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_immunize.attacks.lora import VARIANTS, Lora, run
from hf_immunize.attacks.shape import Attack


@dataclass(frozen=True)
class Dora(Lora):
    """LoRA whose updates are decomposed into direction and magnitude (Liu et al. 2024)."""

    variant: str = field(default="dora", metadata={"help": f"One of {', '.join(VARIANTS)}."})


ATTACK = Attack(config=Dora, run=run, family="LoRA")
