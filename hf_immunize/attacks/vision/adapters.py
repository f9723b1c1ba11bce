"""The PEFT library's other adapters, one row each: what is trained, and PEFT's own config of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from peft import IA3Config, LoHaConfig, LoKrConfig, OFTConfig, PeftConfig, VeraConfig

from hf_immunize.attacks.core.shape import Attack, setting
from hf_immunize.attacks.vision import lora
from hf_immunize.attacks.vision._peft import NOTHING_TO_ADAPT, AdapterConfig, run_adapters


@dataclass(frozen=True)
class Dora(lora.Lora):
    """LoRA whose updates are decomposed into direction and magnitude (Liu et al. 2024)."""

    variant: str = setting("dora", f"One of {', '.join(lora.VARIANTS)}.")


@dataclass(frozen=True)
class Loha(AdapterConfig):
    """AdamW on Hadamard-product updates (Hyeon-Woo et al. 2022), and on a new head."""

    rank: int = setting(8, "Rank of each factor.")


@dataclass(frozen=True)
class Lokr(AdapterConfig):
    """AdamW on Kronecker-product updates (Yeh et al. 2024), and on a new head."""

    rank: int = setting(8, "Rank of the factors.")


@dataclass(frozen=True)
class Oft(AdapterConfig):
    """AdamW on block-orthogonal rotations of the targeted layers (Qiu et al. 2023), and on a new head."""

    blocks: int = setting(0, "Number of rotated blocks; 0 = as block_size says.")
    block_size: int = setting(16, "Rows of one rotated block, where blocks is 0.")


@dataclass(frozen=True)
class IA3(AdapterConfig):
    """AdamW on rescaled activations of the targeted layers (Liu et al. 2022), and on a new head."""


@dataclass(frozen=True)
class Vera(AdapterConfig):
    """AdamW on vectors that scale shared random low-rank projections (Kopiczko et al. 2024), and on a new head."""

    rank: int = setting(64, "Rank of the shared projections.")


def _adapter(
    config: type, make: Callable[[Any, list[str]], PeftConfig], covers: str, refuses: str = NOTHING_TO_ADAPT
) -> Attack:
    """An attack whose runs differ in PEFT's config alone."""
    run = partial(run_adapters, make=make)
    return Attack(config=config, run=run, family="other PEFT", covers=covers, refuses=refuses)


ADAPTERS: dict[str, Attack] = {
    "dora": replace(lora.ATTACK, config=Dora, covers="row lengths that low-rank updates leave alone"),
    "loha": _adapter(Loha, lambda told, on: LoHaConfig(r=told.rank, alpha=told.rank, target_modules=on),
                     "directions that a sum of few products does not reach"),
    "lokr": _adapter(Lokr, lambda told, on: LoKrConfig(r=told.rank, alpha=told.rank, target_modules=on),
                     "directions that a sum of few products does not reach"),
    "oft": _adapter(Oft, lambda told, on: OFTConfig(
        r=told.blocks, oft_block_size=0 if told.blocks else told.block_size, target_modules=on),
        "layers whose lengths must stay, since it only rotates"),
    "ia3": _adapter(IA3, lambda told, on: IA3Config(target_modules=on, feedforward_modules=[]),
                    "features that are there but faint"),
    "vera": _adapter(Vera, lambda told, on: VeraConfig(r=told.rank, target_modules=on),
                     "a defence that counts trained weights",
                     "models whose only linear layer is the head, as of convolutional networks"),
}  # fmt: skip
