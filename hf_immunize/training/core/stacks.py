"""The global batch of every site: gathered by one exchange, and stacked where sites have features of one shape."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_immunize.training.core.exchange import RowExchange
from hf_immunize.training.core.measured import Rows, Side

SIDES: tuple[Side, Side] = ("primary", "harmful")
_NUMBERS = {"cpu": 2**19}
_NUMBERS_ELSEWHERE = 2**24
"""Features of one side in a stack at most, of which a term makes several copies. In float64 4 MiB on a CPU, what fits
its caches (eight times that took up to twice as long), and 128 MiB on an accelerator, where calls cost more."""


@dataclass(frozen=True)
class MicroBatch:
    """Features of one micro-batch on this rank, by side and site, and the labels of each side, best on the CPU."""

    features: Mapping[Side, Mapping[str, Tensor]]
    labels: Mapping[Side, Tensor]


@dataclass(frozen=True)
class SiteStack:
    """S sites whose features have one shape, dtype and device on each side."""

    sites: tuple[str, ...]
    rows: dict[Side, Rows]
    """S×N×D features of all ranks and micro-batches, and their N labels."""
    places: dict[Side, list[Tensor]]
    """Where this rank's rows are among the N, per micro-batch."""


class SiteExchange:
    """Gathers the features of all sites, sides and micro-batches of a step, and their labels, at once."""

    def __init__(self) -> None:
        self._exchange = RowExchange()

    def __call__(self, batches: Sequence[MicroBatch], sites: Sequence[str]) -> Iterator[SiteStack]:
        """Stacks of sites, which together are ``sites``; sites of one shape keep their order."""
        groups: dict[Hashable, list[str]] = {}
        for site in sites:
            groups.setdefault(_shape(batches, site), []).append(site)
        # Rows first, as the exchange wants them: N x S x D.
        told = [torch.stack([batch.features[side][site].detach() for site in group], dim=1)
                for group in groups.values() for side in SIDES for batch in batches]
        told += [batch.labels[side] for side in SIDES for batch in batches]
        found = iter(self._exchange(told))
        features = [{side: [next(found) for _ in batches] for side in SIDES} for _ in groups]
        labels = {side: torch.cat([next(found)[0] for _ in batches]) for side in SIDES}
        for group, parts in zip(groups.values(), features, strict=True):
            whole = {side: torch.cat([rows for rows, _ in parts[side]]).transpose(0, 1) for side in SIDES}
            places = {side: _places(parts[side]) for side in SIDES}
            allowed = _NUMBERS.get(whole["harmful"].device.type, _NUMBERS_ELSEWHERE)
            most = max(1, allowed // max(1, *(value[0].numel() for value in whole.values())))
            for first in range(0, len(group), most):
                part = slice(first, first + most)
                rows = {side: Rows(whole[side][part], labels[side]) for side in SIDES}
                yield SiteStack(tuple(group[part]), rows, places)


def _shape(batches: Sequence[MicroBatch], site: str) -> Hashable:
    values = [batch.features[side][site] for side in SIDES for batch in batches]
    return tuple((value.shape, value.dtype, value.device) for value in values)


def _places(parts: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Places of this rank's rows among those of all micro-batches, one after the other."""
    found, start = [], 0
    for rows, mine in parts:
        found.append(mine + start)
        start += len(rows)
    return found
