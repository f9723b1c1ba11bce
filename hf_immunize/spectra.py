"""Dataset-level spectra as evidence: features of a whole split in, a SpectrumRecord out."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import one_hot
from tqdm.auto import tqdm

from hf_immunize.data import PixelDataset, batches
from hf_immunize.features import RowLayout, extract_features, lying_channels_last
from hf_immunize.linalg import SpectrumStatus, second_moment_spectrum, spectral_steps
from hf_immunize.records import SpectrumRecord

TOLERANCE = 0.2
"""ε of the spectral steps T_ε that are reported."""


def spectrum_record(features_ND: Tensor, labels_N: Tensor, *, site: str, task: str) -> SpectrumRecord:
    """Centred, rank-aware spectrum (by SVD, float64) and spectral steps T_0.2 of one split's features."""
    spectrum = second_moment_spectrum(features_ND, centered=True, method="svd", feature_dtype=features_ND.dtype)
    status = spectrum.status
    defined = status in (SpectrumStatus.OK, SpectrumStatus.RANK_DEFICIENT)
    steps = spectral_steps(features_ND, one_hot(labels_N.long()), TOLERANCE) if defined else None
    return SpectrumRecord(
        site=site,
        task=task,
        rows=spectrum.rows,
        width=spectrum.width,
        rank=int(spectrum.rank),
        status=status.value,
        centered=True,
        feature_dtype=str(features_ND.dtype).removeprefix("torch."),
        condition_number=spectrum.condition_number if defined else None,
        effective_rank=float(spectrum.effective_rank) if defined else None,
        eigenvalues=spectrum.eigenvalues.tolist() if status is not SpectrumStatus.NOT_FINITE else [],
        spectral_steps=steps if steps is not None and steps != float("inf") else None,
    )


def model_spectra(
    model: nn.Module, site: str, tasks: dict[str, PixelDataset | Any], *, layout: RowLayout | None = None
) -> list[SpectrumRecord]:
    """Spectra at one site of a model over whole splits, by task name (``primary``, ``harmful``).

    How an input there becomes one row per image is found unless ``layout`` says it.
    """
    records = []
    with lying_channels_last(model):
        for task, dataset in tasks.items():
            seen = tqdm(batches(dataset), desc=f"{task} features", unit="batch", leave=False, disable=None)
            features = extract_features(model, seen, {site: layout})[site]
            records.append(spectrum_record(features, dataset.labels, site=site, task=task))
    return records
