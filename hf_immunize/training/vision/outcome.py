"""Did it work? The same harmful rows before and after training: the objective's terms, and a ridge probe."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from hf_immunize.errors import SpectrumError
from hf_immunize.features import Captured
from hf_immunize.linalg import ridge_accuracies, to_double
from hf_immunize.records import OutcomeRecord
from hf_immunize.regularizers import alternate_within_classes
from hf_immunize.training.core.registry import AnyTerm, on_features
from hf_immunize.training.core.terms import Rows, TermSettings

_HORIZONS = tuple(10.0**power for power in range(9))
_MOST_ROWS = 2048
_BATCH = 32
_LOST = 0.5
"""Share of the probe's gain over chance that has to be gone."""


@dataclass(frozen=True)
class Measured:
    """Harmful terms and the ridge probe's accuracy at one moment."""

    terms: dict[str, float]
    probe: float


def pick_rows(labels: Sequence[int], most: int = _MOST_ROWS) -> list[int]:
    """At most ``most`` rows, classes in turn, so that each has its share."""
    places: dict[int, int] = {}
    turns = []
    for row, label in enumerate(labels):
        turns.append((places.get(label, 0), row))
        places[label] = places.get(label, 0) + 1
    return sorted(row for _, row in sorted(turns)[:most])


class OutcomeMeter:
    """Measures the same harmful rows whenever it is asked.

    Args:
        rows: any map-style dataset of harmful rows; ``labels`` theirs.
        held_out: whether training does not see them.
        capture: given a model and a batch, runs a forward and returns the captured inputs of ``sites`` and ``head``.
        terms, settings: the objective; terms of harmful rows are measured, summed over sites by their weights.
        on_weights: values of the terms on weights, given a model.
    """

    def __init__(
        self,
        rows: Any,
        labels: Sequence[int],
        *,
        held_out: bool,
        collate: Callable[..., Any],
        capture: Callable[[nn.Module, dict[str, Any]], Captured],
        sites: Mapping[str, float],
        head: str,
        terms: Sequence[AnyTerm],
        settings: TermSettings,
        on_weights: Callable[[nn.Module], dict[str, float]] | None = None,
    ):
        chosen = pick_rows(labels)
        self._labels = torch.tensor([labels[row] for row in chosen])
        # A generator of its own: looking must not change what is drawn in training.
        self._loader = DataLoader(
            Subset(rows, chosen), batch_size=_BATCH, collate_fn=collate, generator=torch.Generator().manual_seed(0)
        )
        self._capture, self._sites, self._head = capture, dict(sites), head
        self._judged = [term for term in terms if term.side == "harmful"]
        self._terms, self._settings, self._on_weights = on_features(self._judged), settings, on_weights
        self.held_out = held_out
        self.before: Measured | None = None

    def start(self, model: nn.Module) -> None:
        """Remember the model before training; nothing where the rows do not allow it, as one row of a class."""
        with contextlib.suppress(SpectrumError):
            self.before = self.measure(model)

    @torch.no_grad()
    def measure(self, model: nn.Module) -> Measured:
        """Terms and probe of the model as it is, in evaluation mode.

        Raises:
            SpectrumError: fewer than two classes with two rows each, or features without a spectrum.
        """
        features: dict[str, list[Tensor]] = {}
        was_training = model.training
        model.eval()
        try:
            for batch in self._loader:
                caught = self._capture(model, batch)
                for name in {*self._sites, self._head}:
                    features.setdefault(name, []).append(caught[name].cpu())
        finally:
            model.train(was_training)
        whole = {name: torch.cat(parts) for name, parts in features.items()}
        terms = {}
        for term in self._terms:
            values = []
            for site, share in self._sites.items():
                rows = Rows(to_double(whole[site]), self._labels, whole[site].dtype)
                values.append(share * float(term.measure(rows, self._settings)))
            terms[term.name] = sum(values)
        terms |= self._on_weights(model) if self._on_weights else {}
        return Measured(terms, _probe(whole[self._head], self._labels))

    def record(self, model: nn.Module) -> OutcomeRecord | None:
        """Before against after; None where nothing was measured before."""
        if self.before is None:
            return None
        after = self.measure(model)
        counts = self._labels.bincount()
        chance = float(counts.max() / counts.sum())
        immunized, told = judge(self.before, after, chance, self._judged, self.held_out)
        return OutcomeRecord(
            rows=len(self._labels), held_out=self.held_out, chance=chance,
            probe_before=self.before.probe, probe_after=after.probe,
            terms_before=self.before.terms, terms_after=after.terms, immunized=immunized, told=told,
        )


def _probe(features_ND: Tensor, labels_N: Tensor) -> float:
    """The best ridge probe of ``_HORIZONS``, each half of the rows judged by the other."""
    one, other = alternate_within_classes(labels_N)
    pairs = ((one, other), (other, one))
    found = [ridge_accuracies(features_ND[a], labels_N[a], features_ND[b], labels_N[b], _HORIZONS) for a, b in pairs]
    return float(torch.stack(found).mean(dim=0).max())


def judge(
    before: Measured, after: Measured, chance: float, terms: Sequence[AnyTerm], held_out: bool
) -> tuple[bool, str]:
    """Whether the objective reached what it is for, and that in one line.

    An objective that tells harmful classes apart is to take the probe at least half of its gain over chance. One that
    conditions features is to lower its terms; it does not stop a probe in closed form, and the line says so.
    """
    lower = sum(t.progress(after.terms[t.name]) for t in terms) < sum(t.progress(before.terms[t.name]) for t in terms)
    gain = before.probe - chance
    lost = (before.probe - after.probe) / gain if gain > 0 else 0.0
    telling = any(term.tells_classes_apart for term in terms)
    immunized = lower and (lost >= _LOST if telling else True)
    names = ", ".join(f"{term.name} {before.terms[term.name]:.3g} -> {after.terms[term.name]:.3g}" for term in terms)
    told = (
        f"{'IMMUNIZED' if immunized else 'NOT IMMUNIZED'}: {names}; ridge probe on {'held-out ' if held_out else ''}"
        f"harmful rows {100 * before.probe:.1f} -> {100 * after.probe:.1f} % (chance {100 * chance:.1f} %)"
    )
    if not immunized:
        return False, f"{told}. Train longer (max_steps), raise strength or max_primary_drop, or train more layers."
    return True, told + ("." if telling else ". Conditioning slows attackers that follow the raw gradient, no others.")

