"""Linear maps between features against numpy, and on features whose map was built."""

import numpy as np
import pytest
import torch

from hf_immunize.errors import SpectrumError
from hf_immunize.linalg import fit_linear_map, truncated


def features(rows, width, seed):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("rows, width", [(60, 5), (5, 5), (6, 20)])
def test_the_map_is_numpys_least_squares_with_an_intercept(rows, width):
    source, target = features(rows, width, 0) + 3, features(rows, 4, 1) - 2
    found = fit_linear_map(source, target)
    centred = [(value - value.mean(0)).numpy() for value in (source, target)]
    matrix = np.linalg.lstsq(*centred, rcond=None)[0]
    other = features(9, width, 2) + 3
    wanted = (other - source.mean(0)).numpy() @ matrix + target.mean(0).numpy()
    assert found(other).numpy() == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("kappa", [1.0, 1e3, 1e6], ids="kappa={:g}".format)
def test_an_invertible_layer_is_undone_on_rows_it_was_not_fitted_on(kappa):
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.linalg.qr(torch.randn(8, 8, generator=generator).double())[0] for _ in range(2))
    layer = left * torch.logspace(0, -np.log10(kappa), 8).double() @ right
    base = features(200, 8, 4)
    found = fit_linear_map((base @ layer)[:100], base[:100])
    assert found.explained((base @ layer)[100:], base[100:]) == pytest.approx(1, abs=1e-6)


def test_unrelated_features_are_not_explained_and_a_constant_target_is_zero():
    source, target = features(400, 5, 0), features(400, 5, 9)
    assert fit_linear_map(source[:200], target[:200]).explained(source[200:], target[200:]) < 0.1
    flat = torch.ones(10, 2, dtype=torch.float64)
    assert fit_linear_map(source[:10], flat).explained(source[:10], flat) == 0.0


def test_other_rows_are_refused():
    with pytest.raises(SpectrumError, match="expected source and target features of the same rows, got 3 and 4"):
        fit_linear_map(features(3, 2, 0), features(4, 2, 0))


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_truncation_is_the_best_of_its_rank(rank):
    matrix = features(6, 5, 7)
    found = truncated(matrix, rank)
    assert int(torch.linalg.matrix_rank(found)) == rank
    tail = torch.linalg.svdvals(matrix)[rank:]
    assert (matrix - found).square().sum().item() == pytest.approx(tail.square().sum().item(), abs=1e-9)
