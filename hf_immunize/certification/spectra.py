"""Dataset-level spectra: what the features of whole splits look like, as an explanation of the verdicts."""

from __future__ import annotations

import math

import torch
from torch import nn

from hf_immunize.data import PixelDataset, batches
from hf_immunize.features import extract_features
from hf_immunize.linalg import second_moment_spectrum, spectral_steps
from hf_immunize.records import SpectrumRecord

SPECTRAL_TOLERANCE = 0.2


def measure_spectrum(model: nn.Module, dataset: PixelDataset, site: str, task: str) -> SpectrumRecord:
    """Centred, rank-aware spectrum of the input of ``site`` over the whole of ``dataset``.

    Includes T_0.2 of THEORY section 7 (``linalg.spectral_steps``); null when the features cannot express the labels
    to a residual of 20 %.
    """
    features = extract_features(model, batches(dataset), [site])[site]
    spectrum = second_moment_spectrum(features)
    steps = math.inf
    if int(spectrum.rank) > 0:
        one_hot = torch.nn.functional.one_hot(dataset.labels, len(dataset.label_names)).double()
        steps = spectral_steps(features, one_hot, SPECTRAL_TOLERANCE)
    condition = float(spectrum.largest / spectrum.smallest) if int(spectrum.rank) > 0 else None
    return SpectrumRecord(
        site=site,
        task=task,
        rows=spectrum.rows,
        width=spectrum.width,
        rank=int(spectrum.rank),
        status=spectrum.status.value,
        centered=True,
        feature_dtype=str(features.dtype).removeprefix("torch."),
        condition_number=condition,
        effective_rank=float(spectrum.effective_rank) if condition is not None else None,
        eigenvalues=spectrum.eigenvalues.tolist(),
        spectral_steps=steps if math.isfinite(steps) else None,
    )
