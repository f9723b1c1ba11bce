"""LoRA through PEFT: the cheapest way most people fine-tune."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from peft import LoraConfig

from hf_immunize.attacks._peft import AdapterConfig, run_adapters
from hf_immunize.attacks.context import AttackContext
from hf_immunize.attacks.shape import Attack, Result, Run
from hf_immunize.errors import ConfigError

VARIANTS = ("plain", "rslora", "pissa", "dora")


@dataclass(frozen=True)
class Lora(AdapterConfig):
    """AdamW on low-rank updates of the targeted layers, and on a new head for the harmful classes."""

    rank: int = field(default=8, metadata={"help": "Rank of each update."})
    alpha: int = field(default=16, metadata={"help": "Updates are scaled by alpha/rank (rslora: alpha/√rank)."})
    variant: str = field(default="plain", metadata={"help": f"One of {', '.join(VARIANTS)}."})

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


def run(context: AttackContext, runs: Sequence[Run]) -> Iterator[tuple[Run, Result]]:
    """One Trainer per run."""
    yield from run_adapters(context, runs, make_config)


ATTACK = Attack(config=Lora, run=run, family="LoRA")
