"""What attackers compute with: precision, and how much of a batch is in memory at a time. The attack stays the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hf_immunize.errors import ConfigError

PRECISIONS = ("float32", "tf32", "bf16")


@dataclass(frozen=True)
class Means:
    """What the attackers of an exam that train a network compute with; the same on every side.

    Features, probes and answers to held-out images are float32 whatever is set here.

    Args:
        precision: float32; tf32, whose products round their factors to 10 bits (GPUs from Ampere on); or bf16, forward
            passes under autocast with weights and optimizer in float32.
        micro_batch_size: images of a step that go through the network at a time; 0: the whole batch, or as much as
            memory holds. The step is that of the whole batch, up to rounding, except where dropout draws or batch
            norms average within the micro-batch.
        gradient_checkpointing: keep what enters each block for the backward pass, and compute the rest again.

    Raises:
        ConfigError: another precision, or a negative size.
    """

    precision: str = "float32"
    micro_batch_size: int = 0
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ConfigError(f"expected precision in {PRECISIONS}, got {self.precision!r}.")
        if self.micro_batch_size < 0:
            raise ConfigError(f"expected micro_batch_size of at least 0, got {self.micro_batch_size}.")

    @property
    def described(self) -> dict[str, Any]:
        """What differs from float32 and whole batches, for traces: those of before stay the same exam."""
        plain = asdict(Means())
        return {name: value for name, value in asdict(self).items() if value != plain[name]}

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Means:
        """The means that a trace's settings tell of."""
        return cls(**{name: told[name] for name in asdict(cls()) if name in told})
