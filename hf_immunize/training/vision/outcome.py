"""Did it work? The same harmful rows before and after training: the objective's terms, and a ridge probe."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from transformers.utils import logging

from hf_immunize.data import NamedRows, NamedStream, Targets, targets_of, unlabelled
from hf_immunize.errors import SpectrumError
from hf_immunize.features import Captured
from hf_immunize.linalg import ridge_accuracies, ridge_r_squared, to_double
from hf_immunize.records import OutcomeRecord, UtilityGuardRecord
from hf_immunize.regularizers import alternate_within_classes
from hf_immunize.training.core.outcome import in_scale_free_terms
from hf_immunize.training.core.registry import AnyTerm, on_features
from hf_immunize.training.core.status import defined
from hf_immunize.training.core.terms import Rows, TermSettings
from hf_immunize.training.vision.harmful_task import HarmfulTask, WithoutTargets
from hf_immunize.training.vision.judging import HORIZONS, Measured, gradient_steps, judge, kept_of

logger = logging.get_logger(__name__)

_MOST_ROWS = 2048
_BATCH = 32


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
        task: harmful rows. Of a stream the first rows are taken.
        held_out: whether training does not see them.
        collate: of rows.
        capture: given a model and a batch, runs a forward and returns the captured inputs of ``sites`` and ``head``.
        terms, settings: the objective; terms of harmful rows are measured, summed over sites by their weights.
        on_weights: values of the terms on weights, given a model.
        workers: processes that read rows.
    """

    def __init__(
        self,
        task: HarmfulTask,
        *,
        held_out: bool,
        collate: Callable[..., Any],
        capture: Callable[[nn.Module, dict[str, Any]], Captured],
        sites: Mapping[str, float],
        head: str,
        terms: Sequence[AnyTerm],
        settings: TermSettings,
        on_weights: Callable[[nn.Module], dict[str, float]] | None = None,
        workers: int = 0,
        most_rows: int = _BATCH,
    ):
        self._most = min(_BATCH, most_rows)
        self.task, self._collate, self._workers = task, collate, workers
        self._capture, self._sites, self._head = capture, dict(sites), head
        self._judged = in_scale_free_terms(terms)
        self._terms, self.settings, self._on_weights = on_features(self._judged), settings, on_weights
        self.held_out = held_out
        self.before: Measured | None = None
        self.unmeasured: str | None = None
        """Why nothing can be said."""
        self._targets: Targets | None = None

    def start(self, model: nn.Module) -> None:
        """Remember the model before training; nothing where the rows do not allow it, as one row of a class."""
        try:
            self.before = self.measure(model)
        except SpectrumError as error:
            self.unmeasured = str(error)

    def _batches(self, most: int = _MOST_ROWS) -> Iterator[Any]:
        """The collated batches of the rows that are measured, and the labels of each row."""
        task = self.task
        collate = WithLabels(self._collate, task.key, task.kind)
        # A generator of its own: looking must not change what is drawn in training.
        draws = torch.Generator().manual_seed(0)
        options: dict[str, Any] = {"batch_size": self._most, "collate_fn": collate, "generator": draws}
        if task.is_stream:
            yield from DataLoader(NamedStream(task.rows, task.name, check=task.check_row, limit=most), **options)
            return
        if task.kind == "classes":
            chosen = pick_rows(task.labels.tolist(), most)
        else:
            chosen = torch.linspace(0, len(task.rows) - 1, min(most, len(task.rows))).round().long().tolist()
        rows = Subset(NamedRows(task.rows, task.name), chosen)
        yield from DataLoader(rows, num_workers=self._workers, **options)

    @torch.no_grad()
    def _look(self, model: nn.Module, names: Iterable[str], most: int) -> tuple[dict[str, Tensor], Targets]:
        """Features of at most so many rows by the name of the layer that reads them, and their targets."""
        features: dict[str, list[Tensor]] = {}
        labels: list[Any] = []
        was_training = model.training
        model.eval()
        try:
            for batch, told in self._batches(most):
                caught = self._capture(model, batch)
                labels += told
                for name in names:
                    features.setdefault(name, []).append(caught[name].cpu())
        finally:
            model.train(was_training)
        unknown = self.task.kind == "unlabelled"
        targets = unlabelled(len(labels)) if unknown else targets_of(labels, self.task.name)
        return {name: torch.cat(parts) for name, parts in features.items()}, targets

    def probe(self, model: nn.Module, most: int) -> float | None:
        """What the probe reaches on at most so many rows; None without labels that tell rows apart.

        Raises:
            SpectrumError: fewer than two classes with two rows each, or features without a spectrum.
        """
        whole, targets = self._look(model, [self._head], most)
        return max(_probes(whole[self._head], targets), default=None)

    @torch.no_grad()
    def measure(self, model: nn.Module) -> Measured:
        """Terms and probe of the model as it is, in evaluation mode.

        Raises:
            SpectrumError: fewer than two classes with two rows each, or features without a spectrum.
        """
        whole, self._targets = self._look(model, {*self._sites, self._head}, _MOST_ROWS)
        of_classes = self._targets.kind == "classes"
        classes = self._targets.values if of_classes else torch.zeros(len(self._targets), dtype=torch.long)
        # as batches are: of rows that lie class by class, a term on small groups would see one class at a time
        mixed = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))
        terms = {}
        for term in self._terms:
            values = []
            for site, share in self._sites.items():
                rows = Rows(to_double(whole[site])[mixed], classes[mixed], whole[site].dtype)
                values.append(share * float(term.measure(rows, self.settings)))
            terms[term.name] = defined(term.name, sum(values))
        terms |= self._on_weights(model) if self._on_weights else {}
        scores = _probes(whole[self._head], self._targets)
        return Measured(terms, max(scores, default=None), tuple(scores))

    def record(self, model: nn.Module, guard: UtilityGuardRecord | None = None) -> OutcomeRecord | None:
        """Before against after; None where either could not be measured, which is said."""
        after = None
        if self.before is not None:
            try:
                after = self.measure(model)
            except SpectrumError as error:  # nothing to compare is no reason to lose what was trained
                self.unmeasured = str(error)
        if self.before is None or after is None or self._targets is None:
            logger.warning(f"NOT MEASURED: whether it worked cannot be said. {self.unmeasured or ''}".strip())
            return None
        metric, chance = _metric_of(self._targets)
        rows = f"{len(self._targets)} {'held-out harmful rows' if self.held_out else 'harmful rows it was trained on'}"
        immunized, told = judge(
            self.before, after, chance, self._judged, rows, kept_of(guard), held_out=self.held_out,
            count=len(self._targets),
        )
        if immunized and not self.held_out:
            told += " Pass harmful_eval_dataset (in a run file: a split 'probe') to hear of rows it was not trained on."
        before, later = gradient_steps(self.before, after, chance)
        return OutcomeRecord(
            rows=len(self._targets), held_out=self.held_out, chance=chance, probe_metric=metric,
            probe_before=self.before.probe, probe_after=after.probe, gradient_steps_before=before,
            gradient_steps_after=later if later is not None and math.isfinite(later) else None,
            terms_before=self.before.terms, terms_after=after.terms, immunized=immunized, told=told,
        )


class WithLabels:
    """Collates rows for a forward, and keeps what they are labelled with beside the batch."""

    def __init__(self, collate: Callable[..., Any], key: str | None, kind: str):
        self._collate = collate if kind == "classes" else WithoutTargets(collate)
        self._key = None if kind == "unlabelled" else key

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> tuple[Any, list[Any]]:
        """One batch, and the label of each row."""
        return self._collate(rows), [None if self._key is None else row[self._key] for row in rows]


def _metric_of(targets: Targets) -> tuple[Literal["accuracy", "r2"] | None, float | None]:
    """What a probe's answers are measured by, and what one reaches that has seen no image."""
    if targets.kind in ("multi-label", "regression"):
        return "r2", 0.0
    if targets.tells_apart < 2:
        return None, None
    counts = targets.values.bincount()
    return "accuracy", float(counts.max() / counts.sum())


def _probes(features_ND: Tensor, targets: Targets) -> list[float]:
    """Ridge probes of ``HORIZONS``, each half of the rows judged by the other; none without targets."""
    metric, _ = _metric_of(targets)
    if metric is None:
        return []
    if metric == "accuracy":
        one, other = alternate_within_classes(targets.values)
        measure: Callable[..., Tensor] = ridge_accuracies
    else:
        one, other = (torch.arange(start, len(targets), 2) for start in (0, 1))
        measure = ridge_r_squared
    known = targets.values
    pairs = ((one, other), (other, one))
    found = [measure(features_ND[a], known[a], features_ND[b], known[b], HORIZONS) for a, b in pairs]
    return [float(score) for score in torch.stack(found).mean(dim=0)]


def logged(outcome: OutcomeRecord) -> dict[str, float]:
    """What of an outcome goes into the log of a run."""
    found = {"harmful_probe_before": outcome.probe_before, "harmful_probe": outcome.probe_after}
    found |= {f"{name}_before": value for name, value in outcome.terms_before.items()}
    found |= {f"{name}_after": value for name, value in outcome.terms_after.items()}
    return {name: value for name, value in found.items() if value is not None}
