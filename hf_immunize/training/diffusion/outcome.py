"""Did it work? The same images of a concept before and after training: the objective's terms, and the denoising loss.

A pipeline has no head that a probe could be fitted for: what an attacker starts from is the loss, and how fast he
lowers it is for the exam to say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hf_immunize.diffusion import Denoiser, DenoisingExam
from hf_immunize.errors import SpectrumError
from hf_immunize.features import RowLayout, capture_inputs
from hf_immunize.linalg import to_double
from hf_immunize.records import OutcomeRecord, UtilityGuardRecord
from hf_immunize.training.core.outcome import Kept, achieved, in_scale_free_terms, lowered, shown, verdict
from hf_immunize.training.core.registry import AnyTerm, on_features
from hf_immunize.training.core.status import defined
from hf_immunize.training.core.terms import Rows, TermSettings
from hf_immunize.training.core.weight_terms import WeightTerm
from hf_immunize.training.diffusion.stream import NoisyBatch

MOST_ROWS = 256
"""Noised rows that terms on features are measured on."""
_MOST = 1.25
"""How many times as large the retain loss may be where no allowance was named."""


@dataclass(frozen=True)
class Seen:
    """Harmful terms, and the mean denoising loss, at one moment."""

    terms: dict[str, float]
    loss: float
    at: dict[str, dict[str, float]] = field(default_factory=dict)
    """By term on features what each site adds to it; sites where it is not defined are missing."""


def at_same_sites(before: Seen, after: Seen) -> tuple[dict[str, float], dict[str, float]]:
    """Terms of both, each summed over the sites at which it is defined both times; without those that have none."""
    common = {name: set(found) & set(after.at.get(name, ())) for name, found in before.at.items()}
    sums = [
        {name: value for name, value in seen.terms.items() if name not in common}
        | {name: sum(seen.at[name][site] for site in sites) for name, sites in common.items() if sites}
        for seen in (before, after)
    ]
    return sums[0], sums[1]


class ConceptOutcome:
    """Measures the same noised images of the concept whenever it is asked; nothing is drawn from global generators.

    Args:
        rows: noised rows, the same each time, a batch at a time.
        exam: of the same images.
        count: how many images.
        held_out: whether training does not see them.
        terms, settings: the objective; terms of harmful rows are measured, summed over sites by their weights.
        sites: layers that features are measured at, with their weights and layouts.
        on_weights: values of the terms on weights, given a model.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        rows: Callable[[], Sequence[NoisyBatch]],
        exam: DenoisingExam,
        count: int,
        *,
        held_out: bool,
        terms: Sequence[AnyTerm],
        settings: TermSettings | None,
        sites: Mapping[str, tuple[float, RowLayout]],
        on_weights: Callable[[nn.Module], dict[str, float]] | None,
    ):
        self._denoiser, self._rows, self._exam, self._count = denoiser, rows, exam, count
        self._judged = in_scale_free_terms(terms)
        self._settings, self._sites, self._on_weights = settings, dict(sites), on_weights
        self.held_out = held_out
        self.before: Seen | None = None

    def start(self, model: nn.Module) -> None:
        """Remember the model before training."""
        self.before = self.measure(model)

    def measure(self, model: nn.Module) -> Seen:
        """Terms and loss of the model as it is, in evaluation mode; a term that is not defined there is left out."""
        was_training = model.training
        model.eval()
        try:
            at = self._of_features(model) if self._settings is not None else {}
            terms = {name: sum(found.values()) for name, found in at.items()}
            terms |= self._on_weights(model) if self._on_weights else {}
            return Seen(terms, self._exam.ask(self._denoiser, model).loss, at)
        finally:
            model.train(was_training)

    @torch.no_grad()
    def _of_features(self, model: nn.Module) -> dict[str, dict[str, float]]:
        parts: dict[str, list[Tensor]] = {site: [] for site in self._sites}
        labels = []
        for batch in self._rows():
            with capture_inputs(model, {site: layout for site, (_, layout) in self._sites.items()}) as caught:
                self._denoiser.call(model, batch.noisy, batch.timesteps, batch.conditions)
            for site, found in parts.items():
                found.append(caught[site].cpu())
            labels.append(batch.labels.cpu())
        whole = {site: torch.cat(found) for site, found in parts.items()}
        assert self._settings is not None
        values: dict[str, dict[str, float]] = {}
        for term in on_features(self._judged):
            for site, (share, _) in self._sites.items():
                rows = Rows(to_double(whole[site]), torch.cat(labels), whole[site].dtype)
                try:
                    value = defined(term.name, float(term.measure(rows, self._settings)))
                    values.setdefault(term.name, {})[site] = share * value
                except SpectrumError:  # features of one point: collapse, which is the goal, has no condition number
                    continue
        return values

    def record(self, model: nn.Module, guard: UtilityGuardRecord | None = None) -> OutcomeRecord | None:
        """Before against after; None where nothing was measured before."""
        if self.before is None:
            return None
        before, after = self.before, self.measure(model)
        first, last = at_same_sites(before, after)
        known = [term for term in self._judged if term.name in first and term.name in last]
        works = bool(known) and lowered(known, first, last)
        if any(isinstance(term, WeightTerm) and term.erases for term in known):
            works = works and after.loss > before.loss
        where = "held-out images of the concept" if self.held_out else "images of the concept it was trained on"
        found = [
            shown(known, first, last),
            f"denoising loss on {self._count} {where} {before.loss:.4g} -> {after.loss:.4g}",
        ]
        other = achieved(known, "one with another name, optimizer or rate")
        immunized, told = verdict(works, kept_of(guard), found, other, "weights")
        return OutcomeRecord(
            rows=self._count, held_out=self.held_out, chance=None, probe_metric=None, probe_before=None,
            probe_after=None, terms_before=first, terms_after=last, loss_before=before.loss,
            loss_after=after.loss, immunized=immunized, told=told,
        )


def kept_of(guard: UtilityGuardRecord | None) -> Kept:
    """What the retain loss was and is; points are -100 log of it."""
    if guard is None:
        return Kept()
    base, final = (math.exp(-points / 100) for points in (guard.base, guard.final))
    return Kept(f"retain loss {base:.4g} -> {final:.4g}", guard.allowed is None and not final <= _MOST * base)
