"""Whatever a decomposition cannot take is a typed error, never LAPACK's own."""

from __future__ import annotations

import math

import pytest
import torch

from hf_immunize.errors import DecompositionError, SpectrumError
from hf_immunize.linalg import (
    RowFactor,
    frechet_distance,
    ridge_accuracies,
    ridge_r_squared,
    ridge_weights,
    second_moment_spectrum,
    spectral_adversary,
    truncated,
)
from hf_immunize.linalg.factor import factor_features, factor_moment
from hf_immunize.linalg.whitening import fit_feature_map
from hf_immunize.regularizers import closed_form_adversary, log_condition
from hf_immunize.training.core.field_terms import probe_trap

CLASSES = torch.arange(8) % 2
ONE_HOT = torch.nn.functional.one_hot(CLASSES).double()
FUNCTIONS = {
    "spectral_adversary": lambda x: spectral_adversary(x, ONE_HOT, x, ONE_HOT, 10.0),
    "closed_form_adversary": lambda x: closed_form_adversary(x, CLASSES, horizon=10.0),
    "ridge_weights": lambda x: ridge_weights(x, ONE_HOT, torch.tensor(1.0, dtype=torch.float64)),
    "ridge_accuracies": lambda x: ridge_accuracies(x, CLASSES, x, CLASSES, [10.0]),
    "ridge_r_squared": lambda x: ridge_r_squared(x, ONE_HOT, x, ONE_HOT, [10.0]),
    "fit_feature_map": lambda x: fit_feature_map(x, "whitened"),
    "truncated": lambda x: truncated(x, 1),
    "factor_features": factor_features,
    "factor_moment": lambda x: factor_moment(x[:3] + x[:3].mT),
    "frechet_distance": lambda x: frechet_distance(x, x),
    "probe_trap": lambda x: probe_trap(x, CLASSES, 2),
}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_matrix_that_is_not_finite_is_a_spectrum_error(name, value):
    rows = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[1, 1] = value
    with pytest.raises(SpectrumError, match="NaN"):
        FUNCTIONS[name](rows)


@pytest.mark.parametrize("name", ["spectral_adversary", "ridge_weights"])
def test_a_finite_matrix_whose_squares_are_infinite_is_a_decomposition_error(name):
    with pytest.raises(DecompositionError, match="expected a matrix that can be decomposed.*too large"):
        FUNCTIONS[name](torch.full((8, 3), 1e200, dtype=torch.float64) * torch.arange(1, 9)[:, None])


def test_a_spectrum_of_such_a_matrix_is_a_status_or_the_same_error():
    rows = torch.full((8, 3), math.nan, dtype=torch.float64)
    assert math.isnan(log_condition(second_moment_spectrum(rows)))
    factor = RowFactor()
    factor.add(rows)
    assert math.isnan(factor.spectrum().log_condition)
    with pytest.raises(DecompositionError):
        second_moment_spectrum(torch.randn(8, 3).double() * 1e200, method="gram")
