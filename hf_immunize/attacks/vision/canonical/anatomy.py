"""What of a network takes part in changes of scale."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from hf_immunize.attacks.vision.canonical.links import Links


@dataclass(frozen=True)
class Layer:
    """A linear map, or a factor per channel: weight, bias and variables by group (G × in, G × out)."""

    weight: str
    bias: str | None
    inputs: Tensor
    outputs: Tensor
    diagonal: bool = False
    kernel: int = 1
    """Positions that a convolution's kernel covers."""


@dataclass(frozen=True)
class Norm:
    """A normalisation: what comes in may have any scale (per channel where it is a batch norm), what comes out too."""

    weight: str
    bias: str | None
    inputs: Tensor
    outputs: Tensor
    statistics: tuple[str, str] | None = None
    """Names of the running mean and variance of a batch norm."""
    epsilon: float = 0.0


@dataclass
class Anatomy:
    """All of it, and how the variables hang together."""

    links: Links = field(default_factory=Links)
    layers: list[Layer] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)
    tables: dict[str, Tensor] = field(default_factory=dict)
    """Parameters that are activations themselves (position embeddings, class tokens): their variables."""
    scores: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Queries and keys that meet in a product: variables of heads × width each."""
    values: list[Tensor] = field(default_factory=list)
    """What attention averages over tokens: variables of heads × width."""
    kernels: list[str] = field(default_factory=list)
    """Parameters that are used in units of the mean and the standard deviation of their rows."""
    products: int = 0
    """Products of two activations whose scales are both free."""
    others: list[Anatomy] = field(default_factory=list)
    """The same variables, tied otherwise where two activations are multiplied (``following.SHARES``)."""

    @property
    def mixed_or_stored(self) -> set[int]:
        """Variables that something beside linear maps meets, and those of ``tables``."""
        return self.links.mixed | {variable for table in self.tables.values() for variable in table.flatten().tolist()}
