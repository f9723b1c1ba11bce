"""The terms at every site, on the global batch: λ-weighted gradients at this rank's features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_immunize.training.core.balancing import TermWeights, numbers, update_together
from hf_immunize.training.core.bank import FeatureBank
from hf_immunize.training.core.evaluation import Evaluated, evaluate_stack
from hf_immunize.training.core.measured import Rows, Side, Term, TermSettings
from hf_immunize.training.core.meter import Meter
from hf_immunize.training.core.stacks import SIDES, MicroBatch, SiteExchange, SiteStack

__all__ = ["SIDES", "GlobalObjective", "MicroBatch", "SiteGradients"]

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
        self._gather = SiteExchange()

    @property
    def sites(self) -> list[str]:
        """Names of the layers whose inputs are measured."""
        return list(self.weights)

    def gradients(self, batches: Sequence[MicroBatch], *, spectra: bool) -> list[SiteGradients]:
        """λ-weighted gradients at this rank's features, per micro-batch; ``spectra`` puts spectra in the log too.

        Every site is measured on its own; sites with features of one shape share the calls that measure them. Ranks
        exchange everything by one collective.
        """
        found: list[SiteGradients] = [{side: {} for side in SIDES} for _ in batches]
        totals: dict[str, Tensor] = {}
        for stack in self._gather(batches, self.sites):
            evaluated = evaluate_stack(
                self.terms, stack.rows, self.settings, past=self._past(stack),
                memories=[self.memory[site] for site in stack.sites],
            )
            self._remember(stack)
            weights = [self.weights[site] for site in stack.sites]
            lambdas = update_together(weights, evaluated.gradients)
            self._observe(stack.sites, evaluated, lambdas, spectra)
            shares = [one.site_share for one in weights]
            for name, values in evaluated.values.items():
                total = (values * numbers(shares, values)).sum()
                totals[name] = totals[name] + total.to(totals[name]) if name in totals else total
            for side in SIDES:
                summed = self._summed(side, evaluated, lambdas, stack.rows[side].features)
                for gradients, place in zip(found, stack.places[side], strict=True):
                    own = summed.index_select(1, place.to(summed.device))
                    gradients[side] |= dict(zip(stack.sites, own, strict=True))
        self.meter.add(totals)
        return found

    def _summed(self, side: Side, evaluated: Evaluated, lambdas: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """Σ over a side's terms of λ × gradient, S×N×D."""
        parts = [lambdas[term.name][:, None, None] * evaluated.gradients[term.name]
                 for term in self.terms if term.side == side]
        if not parts:
            return torch.zeros_like(like, dtype=torch.float64)
        return sum(parts[1:], start=parts[0])

    def _past(self, stack: SiteStack) -> dict[Side, Rows]:
        """What the bank holds of these sites, stacked; nothing without a bank or before its first step."""
        if self.bank is None:
            return {}
        kept = {side: [self.bank.past(side, site) for site in stack.sites] for side in SIDES}
        return {side: Rows(torch.stack([one.features for one in rows if one]), rows[0].labels)
                for side, rows in kept.items() if rows[0] is not None}

    def _remember(self, stack: SiteStack) -> None:
        for side, rows in stack.rows.items() if self.bank else ():
            for site, part in zip(stack.sites, rows.sites, strict=True):
                self.bank.add(side, site, part)  # type: ignore[union-attr]

    def _observe(
        self, sites: Sequence[str], evaluated: Evaluated, lambdas: Mapping[str, Tensor], spectra: bool
    ) -> None:
        """Values for the log; with several sites each under its own name besides the weighted sum over sites."""
        many = len(self.weights) > 1
        ends = [f"/{site}" if many else "" for site in sites]
        for name, value in lambdas.items():
            self.meter.add_each([f"lambda/{name}{end}" for end in ends], value)
        for name, value in evaluated.values.items() if many else ():
            self.meter.add_each([f"{name}{end}" for end in ends], value)
        for side, rows in evaluated.rows.items() if spectra else ():
            spectrum = rows.spectrum
            found = {"log_kappa": spectrum.log_condition, "effective_rank": spectrum.effective_rank}
            for name, value in found.items():
                self.meter.add_each([f"{side}_{name}{end}" for end in ends], value, diagnostic=True)

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, as tensors."""
        kept: dict[str, Tensor] = {}
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
