"""LoRA through PEFT: the cheapest way most people fine-tune."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from peft import LoraConfig

from hf_immunize.attacks.core.shape import Attack, setting
from hf_immunize.attacks.vision._peft import NOTHING_TO_ADAPT, AdapterConfig, run_adapters
from hf_immunize.errors import ConfigError

VARIANTS = ("plain", "rslora", "pissa", "dora")


@dataclass(frozen=True)
class Lora(AdapterConfig):
    """AdamW on low-rank updates of the targeted layers, and on a new head for the harmful classes."""

    rank: int = setting(8, "Rank of each update.")
    alpha: int = setting(16, "Updates are scaled by alpha/rank (rslora: alpha/√rank).")
    variant: str = setting("plain", f"One of {', '.join(VARIANTS)}.")

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ConfigError(f"expected a LoRA variant in {VARIANTS}, got {self.variant!r}.")


def make_config(config: Lora, targets: list[str]) -> LoraConfig:
    """PEFT's config of this run."""
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=targets,
        use_rslora=config.variant == "rslora",
        use_dora=config.variant == "dora",
        init_lora_weights="pissa" if config.variant == "pissa" else True,
    )


ATTACK = Attack(
    config=Lora, run=partial(run_adapters, make=make_config), family="LoRA",
    covers="a defence that counts on all weights being trained", refuses=NOTHING_TO_ADAPT,
)
