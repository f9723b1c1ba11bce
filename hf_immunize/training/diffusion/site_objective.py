"""The terms at every site, on the global batch: λ-weighted gradients at this rank's pooled features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_immunize.training.balancing import TermWeights
from hf_immunize.training.distributed import gather_rows
from hf_immunize.training.meter import Meter
from hf_immunize.training.objective import Evaluated, Rows, Side, Term, TermSettings, evaluate_terms

SIDES: tuple[Side, Side] = ("primary", "harmful")
SiteGradients = dict[Side, dict[str, Tensor]]


@dataclass(frozen=True)
class MicroBatch:
    """Pooled features of one micro-batch on this rank, by side and site, and the labels of each side."""

    features: Mapping[Side, Mapping[str, Tensor]]
    labels: Mapping[Side, Tensor]


class SiteObjective:
    """(1/S) Σ over S sites of Σ over terms of λ × value, balanced at each site on its own."""

    def __init__(
        self,
        terms: tuple[Term, ...],
        settings: TermSettings,
        sites: Sequence[str],
        *,
        weight: str,
        strength: float,
        shares: str | None,
        meter: Meter,
    ):
        self.terms, self.meter = terms, meter
        self._settings = settings
        self.weights = {site: TermWeights(terms, weight, strength / len(sites), shares) for site in sites}

    @property
    def sites(self) -> list[str]:
        """Names of the layers whose inputs are measured."""
        return list(self.weights)

    def gradients(self, batches: Sequence[MicroBatch], *, spectra: bool) -> list[SiteGradients]:
        """λ-weighted gradients at this rank's features of each micro-batch; ``spectra`` puts spectra in the log."""
        found: list[SiteGradients] = [{side: {} for side in SIDES} for _ in batches]
        totals: dict[str, Tensor] = {}
        for site, weights in self.weights.items():
            rows, places = _global_rows(batches, site)
            evaluated = evaluate_terms(self.terms, rows, self._settings)
            lambdas = weights.update(evaluated.gradients)
            self._observe(site, evaluated, lambdas, spectra)
            for name, value in evaluated.values.items():
                totals[name] = totals.get(name, 0) + value / len(self.weights)
            for side in SIDES:
                summed = torch.zeros_like(rows[side].features, dtype=torch.float64)
                for term in self.terms:
                    if term.side == side:
                        summed = summed + (lambdas[term.name] * evaluated.gradients[term.name]).to(summed.device)
                for gradients, place in zip(found, places[side], strict=True):
                    gradients[side][site] = summed[place]
        self.meter.add(totals)
        return found

    def _observe(self, site: str, evaluated: Evaluated, lambdas: Mapping[str, Tensor], spectra: bool) -> None:
        self.meter.add({f"lambda/{name}/{site}": value for name, value in lambdas.items()})
        for side, rows in evaluated.rows.items() if spectra else ():
            spectrum = rows.spectrum
            self.meter.add(
                {
                    f"{side}_log_kappa/{site}": spectrum.log_condition.detach(),
                    f"{side}_effective_rank/{site}": spectrum.effective_rank.detach(),
                }
            )


def _global_rows(batches: Sequence[MicroBatch], site: str) -> tuple[dict[Side, Rows], dict[Side, list[Tensor]]]:
    """Rows of all ranks and micro-batches at a site, and the places of this rank's among them, per micro-batch."""
    rows: dict[Side, Rows] = {}
    places: dict[Side, list[Tensor]] = {}
    for side in SIDES:
        features, labels, start = [], [], 0
        places[side] = []
        for batch in batches:
            gathered, mine = gather_rows(batch.features[side][site])
            features.append(gathered)
            labels.append(gather_rows(batch.labels[side])[0])
            places[side].append(mine + start)
            start += len(gathered)
        rows[side] = Rows(torch.cat(features), torch.cat(labels))
    return rows, places
