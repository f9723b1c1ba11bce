"""Features of past steps, for spectra of more rows than one batch holds."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_immunize.training.core.terms import Rows, Side


class FeatureBank:
    """The newest rows of each site and side, up to ``capacity``, as they were when their step was taken.

    A term measures the batch together with these rows; only the batch carries a gradient, so a term that is a mean
    over rows has its gradient shrunk by n/(n + bank), which auto weights undo. The past rows are stale: they are
    features of the weights of their step, off by about learning rate × age. That bias is of first order for smooth
    quantities (R_well, the adversary); the smallest eigenvalue comes out too large by about the squared
    drift, so that κ is underestimated where features have directions smaller than that (a LayerNorm's constant
    direction). Whole steps are dropped, oldest first, so
    that what is kept does not depend on the order of rows within a step, nor on the number of processes.

    Memory: capacity × width in the features' own dtype, per side and site, on every rank.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._steps: dict[tuple[Side, str], list[tuple[Tensor, Tensor]]] = {}

    def past(self, side: Side, site: str) -> Rows | None:
        """Rows kept so far, newest last; None when there are none."""
        kept = self._steps.get((side, site))
        if not kept:
            return None
        return Rows(torch.cat([features for features, _ in kept]), torch.cat([labels for _, labels in kept]))

    def add(self, side: Side, site: str, rows: Rows) -> None:
        """Keep one step's global batch; a step larger than the capacity is not kept at all."""
        kept = self._steps.setdefault((side, site), [])
        kept.append((rows.features.detach(), rows.labels))
        while sum(len(labels) for _, labels in kept) > self.capacity:
            kept.pop(0)

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, as tensors."""
        found = {}
        for (side, site), kept in self._steps.items():
            for place, (features, labels) in enumerate(kept):
                found[f"{side}|{site}|{place}|features"] = features.cpu()
                found[f"{side}|{site}|{place}|labels"] = labels.cpu()
        return found

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what ``state`` returned."""
        self._steps = {}
        places = sorted({tuple(name.split("|")[:3]) for name in state}, key=lambda key: (*key[:2], int(key[2])))
        for side, site, place in places:
            pair = state[f"{side}|{site}|{place}|features"], state[f"{side}|{site}|{place}|labels"]
            self._steps.setdefault((side, site), []).append(pair)  # type: ignore[arg-type]
