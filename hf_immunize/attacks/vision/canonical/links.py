"""Scales that have to agree: one positive factor per variable, tied to others or to its inverse.

A variable is an integer; 0 stands for the factor 1 that nothing may change. Tensors of variables have the shape of the
activations they speak of; ``ANY`` marks zeros, which every factor leaves as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

FIXED = 0
ANY = -1


class Links:
    """A union of variables, each equal to its root or to the root's inverse."""

    def __init__(self) -> None:
        self._parent = [FIXED]
        self._sign = [1]
        self.mixed: set[int] = set()
        """Variables of activations that something beside a linear map meets channel by channel."""

    def __len__(self) -> int:
        return len(self._parent)

    def new(self, *shape: int) -> Tensor:
        """Fresh variables."""
        start = len(self._parent)
        found = torch.arange(start, start + torch.Size(shape).numel()).view(shape)
        self._parent += found.flatten().tolist()
        self._sign += [1] * found.numel()
        return found

    def root(self, variable: int) -> tuple[int, int]:
        """Root and sign: the variable's factor is the root's to the power of the sign. Root 0: the factor is 1."""
        trail, sign = [], 1
        while (above := self._parent[variable]) != variable:
            trail.append((variable, sign))
            sign *= self._sign[variable]
            variable = above
        for step, before in trail:
            self._parent[step], self._sign[step] = variable, sign * before
        return variable, sign

    def tie(self, first: Tensor, second: Tensor, sign: int = 1) -> None:
        """Equal factors (or inverse ones, with ``sign`` -1) wherever both, broadcast, speak of the same place."""
        one, other = _compact(*torch.broadcast_tensors(first, second))
        pairs = torch.stack([one.flatten(), other.flatten()], dim=1)
        pairs = pairs[(pairs != ANY).all(dim=1)]
        for left, right in torch.unique(pairs, dim=0).tolist():
            self._join(left, right, sign)

    def fix(self, variables: Tensor) -> None:
        """Nothing may change the factor of these."""
        self.tie(variables, torch.tensor(FIXED))

    def mix(self, variables: Tensor) -> None:
        """Only a factor per channel passes here, no linear map between channels."""
        self.mixed |= set(torch.unique(_compact(variables)[0]).tolist())

    def _join(self, left: int, right: int, sign: int) -> None:
        (one, first), (other, second) = self.root(left), self.root(right)
        relation = first * second * sign
        if one == other:
            if relation < 0 and one != FIXED:  # equal to its own inverse
                self._parent[one], self._sign[one] = FIXED, 1
            return
        keep, drop = (one, other) if one == FIXED or (other != FIXED and one < other) else (other, one)
        self._parent[drop], self._sign[drop] = keep, relation


def _compact(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Without repetitions along axes on which all of them are expanded."""
    for axis in range(tensors[0].dim()):
        if all(tensor.stride(axis) == 0 for tensor in tensors):
            tensors = tuple(tensor.narrow(axis, 0, 1) for tensor in tensors)
    return tensors
