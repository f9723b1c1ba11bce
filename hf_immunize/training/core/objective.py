"""The terms at every site, on the global batch: λ-weighted gradients at this rank's features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_immunize.training.core.balancing import TermWeights
from hf_immunize.training.core.bank import FeatureBank
from hf_immunize.training.core.distributed import gather_rows, world
from hf_immunize.training.core.meter import Meter
from hf_immunize.training.core.terms import Evaluated, Rows, Side, Term, TermSettings, evaluate_terms

SIDES: tuple[Side, Side] = ("primary", "harmful")


@dataclass(frozen=True)
class MicroBatch:
    """Features of one micro-batch on this rank, by side and site, and the labels of each side, best on the CPU."""

    features: Mapping[Side, Mapping[str, Tensor]]
    labels: Mapping[Side, Tensor]


SiteGradients = dict[Side, dict[str, Tensor]]


class GlobalObjective:
    """Σ over sites of site weight × Σ over terms of λ × value, its gradient, and what it remembers between steps.

    Args:
        terms, settings: the objective.
        site_weights: weight of each site.
        weight, strength, shares: see TermWeights; balanced at each site on its own.
        bank_rows: rows of past steps to measure along with each batch; 0 for none.
    """

    def __init__(
        self,
        terms: tuple[Term, ...],
        settings: TermSettings,
        site_weights: Mapping[str, float],
        *,
        weight: str,
        strength: float,
        shares: str | None,
        bank_rows: int,
        meter: Meter,
    ):
        self.terms, self.settings, self.meter = terms, settings, meter
        self.weights = {
            site: TermWeights(terms, weight, strength, shares, share) for site, share in site_weights.items()
        }
        self.bank = FeatureBank(bank_rows) if bank_rows else None
        self.memory: dict[str, dict[str, dict[str, Tensor]]] = {site: {} for site in site_weights}

    @property
    def sites(self) -> list[str]:
        """Names of the layers whose inputs are measured."""
        return list(self.weights)

    @property
    def strength(self) -> float:
        """The strength in force, after the guard's factor."""
        first = next(iter(self.weights.values()))
        return first.strength * first.factor

    @property
    def factor(self) -> float:
        """What the utility guard multiplies the strength with, at every site."""
        return next(iter(self.weights.values())).factor

    @factor.setter
    def factor(self, value: float) -> None:
        for weights in self.weights.values():
            weights.factor = value

    def gradients(self, batches: Sequence[MicroBatch], *, spectra: bool) -> list[SiteGradients]:
        """λ-weighted gradients at this rank's features, per micro-batch; ``spectra`` puts spectra in the log too."""
        found: list[SiteGradients] = [{side: {} for side in SIDES} for _ in batches]
        totals: dict[str, Tensor] = {}
        for site, weights in self.weights.items():
            rows, places = _global_rows(batches, site)
            past = {side: kept for side in SIDES if self.bank and (kept := self.bank.past(side, site))}
            evaluated = evaluate_terms(self.terms, rows, self.settings, past=past, memory=self.memory[site])
            for side in SIDES if self.bank else ():
                self.bank.add(side, site, rows[side])  # type: ignore[union-attr]
            lambdas = weights.update(evaluated.gradients)
            self._observe(site, evaluated, lambdas, spectra)
            for name, value in evaluated.values.items():
                totals[name] = totals.get(name, 0) + value * weights.site_share
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
        """Values for the log; with several sites each under its own name besides the weighted sum over sites."""
        many = len(self.weights) > 1
        end = f"/{site}" if many else ""
        self.meter.add({f"lambda/{name}{end}": value for name, value in lambdas.items()})
        if many:
            self.meter.add({f"{name}{end}": value for name, value in evaluated.values.items()})
        for side, rows in evaluated.rows.items() if spectra else ():
            spectrum = rows.spectrum
            found = {"log_kappa": spectrum.log_condition, "effective_rank": spectrum.effective_rank}
            self.meter.add({f"{side}_{name}{end}": value.detach() for name, value in found.items()}, diagnostic=True)

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, as tensors."""
        kept = {}
        for site, weights in self.weights.items():
            kept |= {f"weights|{site}|{name}": value for name, value in weights.state().items()}
            for term, memory in self.memory[site].items():
                kept |= {f"memory|{site}|{term}|{name}": value.cpu() for name, value in memory.items()}
        return kept | {f"bank|{name}": value for name, value in (self.bank.state() if self.bank else {}).items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what ``state`` returned."""
        for site, weights in self.weights.items():
            weights.load_state(_under(state, f"weights|{site}|"))
            self.memory[site] = {}
            for name, value in _under(state, f"memory|{site}|").items():
                term, key = name.split("|")
                self.memory[site].setdefault(term, {})[key] = value
        if self.bank:
            self.bank.load_state(_under(state, "bank|"))


def _under(state: Mapping[str, Tensor], start: str) -> dict[str, Tensor]:
    return {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}


def _global_rows(batches: Sequence[MicroBatch], site: str) -> tuple[dict[Side, Rows], dict[Side, list[Tensor]]]:
    """Rows of all ranks and micro-batches at a site, and the places of this rank's among them, per micro-batch."""
    rows, places = {}, {}
    for side in SIDES:
        parts = [(gather_rows(b.features[side][site]), _labels(b, side, site)) for b in batches]
        starts = np.cumsum([0] + [len(labels) for _, labels in parts])
        features = torch.cat([gathered for (gathered, _), _ in parts])
        rows[side] = Rows(features, torch.cat([labels for _, labels in parts]))
        places[side] = [mine + int(start) for ((_, mine), _), start in zip(parts, starts, strict=False)]
    return rows, places


def _labels(batch: MicroBatch, side: Side, site: str) -> Tensor:
    """Labels of all ranks. Collectives want them beside the features; alone they stay where reading them is free."""
    labels = batch.labels[side]
    return labels if world()[1] == 1 else gather_rows(labels.to(batch.features[side][site].device))[0]
