"""OFT through PEFT: orthogonal rotations of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from peft import OFTConfig

from hf_immunize.attacks.core.shape import Attack, setting
from hf_immunize.attacks.vision._peft import AdapterConfig, run_adapters


@dataclass(frozen=True)
class Oft(AdapterConfig):
    """AdamW on block-orthogonal rotations of the targeted layers (Qiu et al. 2023), and on a new head."""

    blocks: int = setting(0, "Number of rotated blocks; 0 = as block_size says.")
    block_size: int = setting(16, "Rows of one rotated block, where blocks is 0.")


def make_config(config: Oft, targets: list[str]) -> OFTConfig:
    """PEFT's config of this run."""
    return OFTConfig(r=config.blocks, oft_block_size=0 if config.blocks else config.block_size, target_modules=targets)


ATTACK = Attack(config=Oft, run=partial(run_adapters, make=make_config), family="other PEFT")
