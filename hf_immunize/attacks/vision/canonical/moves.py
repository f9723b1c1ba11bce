"""Changes of weights that may keep the function, and the trial of them on images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Named = Mapping[str, Tensor]
"""Parameters and buffers of a float64 model by name."""


@dataclass(frozen=True)
class Move:
    """A change of some tensors in place."""

    touched: tuple[str, ...]
    make: Callable[[Named], None]
    otherwise: Move | None = None
    """A smaller one that is tried where this one does not hold."""


@torch.no_grad()
def attempt(moves: Sequence[Move], named: Named, holds: Callable[[], bool]) -> int:
    """Make all moves that keep the function, and put back the others; returns how many (or their smaller ones) stay.

    All are tried at once, and halves where that fails: a check is a forward, and in most networks all hold.

    Args:
        holds: whether the model computes what it did.
    """
    if not moves:
        return 0
    held = {name: named[name].clone() for move in moves for name in move.touched}
    for move in moves:
        move.make(named)
    if holds():
        return len(moves)
    for name, value in held.items():
        named[name].copy_(value)
    if len(moves) == 1:
        return attempt([moves[0].otherwise], named, holds) if moves[0].otherwise else 0
    half = len(moves) // 2
    return attempt(moves[:half], named, holds) + attempt(moves[half:], named, holds)
