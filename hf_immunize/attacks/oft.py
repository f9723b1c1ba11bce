"""OFT through PEFT: orthogonal rotations of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from peft import OFTConfig

from hf_immunize.attacks._peft import AdapterConfig, run_adapters
from hf_immunize.attacks.context import AttackContext
from hf_immunize.attacks.shape import Attack, Result, Run


@dataclass(frozen=True)
class Oft(AdapterConfig):
    """AdamW on block-orthogonal rotations of the targeted layers (Qiu et al. 2023), and on a new head."""

    blocks: int = field(default=0, metadata={"help": "Number of rotated blocks; 0 = as block_size says."})
    block_size: int = field(default=16, metadata={"help": "Rows of one rotated block, where blocks is 0."})


def make_config(config: Oft, targets: list[str]) -> OFTConfig:
    """PEFT's config of this run."""
    return OFTConfig(r=config.blocks, oft_block_size=0 if config.blocks else config.block_size, target_modules=targets)


def run(context: AttackContext, runs: Sequence[Run]) -> Iterator[tuple[Run, Result]]:
    """One Trainer per run."""
    yield from run_adapters(context, runs, make_config)


ATTACK = Attack(config=Oft, run=run, family="other PEFT")
