"""Dataset-level spectra as evidence: features of a whole split in, a SpectrumRecord out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from tqdm.auto import tqdm

from hf_immunize.data import PixelDataset, batches
from hf_immunize.features import RowLayout, feature_batches, lying_channels_last
from hf_immunize.linalg import RowFactor, SpectrumStatus
from hf_immunize.records import SpectrumRecord

TOLERANCE = 0.2
"""ε of the spectral steps T_ε that are reported."""
GROUPS = 6
"""Parts of the rows, halves of which show how much κ depends on which rows were measured."""


def spectrum_record(features_ND: Tensor, labels_N: Tensor, *, site: str, task: str) -> SpectrumRecord:
    """Centred, rank-aware spectrum (from a triangular factor, float64) and spectral steps T_0.2 of a split's features.

    Rows may lie on any device; they are taken in by blocks.
    """
    factor, groups = RowFactor(), _Groups()
    factor.add(features_ND, one_hot(labels_N.long()))
    groups.add(features_ND)
    return _record(factor, site, task, features_ND.dtype, groups.condition_numbers())


def group_of(rows: Tensor) -> Tensor:
    """The group of each row: the fractional part of row × golden ratio, in six parts. No period of labels survives."""
    return ((rows.long() * 2654435761) % 2**32) * GROUPS // 2**32


class _Groups:
    """The same rows dealt to six factors, so that halves of them can be put together again."""

    def __init__(self) -> None:
        self.factors = [RowFactor() for _ in range(GROUPS)]
        self.seen = 0

    def add(self, features_ND: Tensor) -> None:
        """Deal rows."""
        places = group_of(torch.arange(self.seen, self.seen + len(features_ND)))
        self.seen += len(features_ND)
        for group, factor in enumerate(self.factors):
            rows = features_ND[places.to(features_ND.device) == group]
            if len(rows):
                factor.add(rows)

    def condition_numbers(self) -> list[float | None]:
        """κ of ten halves of the rows, each group being in five of them; nothing where there are too few rows."""
        if self.seen < 2 * GROUPS:
            return []
        halves = [half if index % 2 else tuple(set(range(GROUPS)) - set(half))
                  for index, half in enumerate(half for half in combinations(range(GROUPS), GROUPS // 2) if 0 in half)]
        found = [RowFactor.joined([self.factors[group] for group in half]).spectrum() for half in halves]
        defined = (SpectrumStatus.OK, SpectrumStatus.RANK_DEFICIENT)
        return [spectrum.condition_number if spectrum.status in defined else None for spectrum in found]


def _record(
    factor: RowFactor, site: str, task: str, dtype: torch.dtype, halves: Sequence[float | None] = ()
) -> SpectrumRecord:
    spectrum = factor.spectrum()
    status = spectrum.status
    defined = status in (SpectrumStatus.OK, SpectrumStatus.RANK_DEFICIENT)
    steps = factor.spectral_steps(TOLERANCE) if defined else None
    return SpectrumRecord(
        site=site,
        task=task,
        rows=spectrum.rows,
        width=spectrum.width,
        rank=int(spectrum.rank),
        status=status.value,
        centered=True,
        feature_dtype=str(dtype).removeprefix("torch."),
        condition_number=spectrum.condition_number if defined else None,
        condition_of_halves=list(halves),
        effective_rank=float(spectrum.effective_rank) if defined else None,
        eigenvalues=spectrum.eigenvalues.tolist() if status is not SpectrumStatus.NOT_FINITE else [],
        spectral_steps=steps if steps is not None and steps != float("inf") else None,
    )


def model_spectra(
    model: nn.Module, site: str, tasks: dict[str, PixelDataset | Any], *, layout: RowLayout | None = None
) -> list[SpectrumRecord]:
    """Spectra at one site of a model over whole splits, by task name (``primary``, ``harmful``).

    How an input there becomes one row per image is found unless ``layout`` says it. Rows are taken in batch by batch
    on the model's device; never more of them are held than a block of the factor's.
    """
    records = []
    with lying_channels_last(model):
        for task, dataset in tasks.items():
            seen = tqdm(batches(dataset), desc=f"{task} features", unit="batch", leave=False, disable=None)
            targets, factor, groups = one_hot(dataset.labels.long()), RowFactor(), _Groups()
            for found in feature_batches(model, seen, {site: layout}):
                rows = found[site]
                factor.add(rows, targets[factor.rows : factor.rows + len(rows)])
                groups.add(rows)
            records.append(_record(factor, site, task, rows.dtype, groups.condition_numbers()))
    return records
