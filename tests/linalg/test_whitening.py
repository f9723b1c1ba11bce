import numpy as np
import pytest
import torch

from hf_immunize.errors import SpectrumError
from hf_immunize.linalg.whitening import FEATURE_MAPS, fit_feature_map


@pytest.fixture
def features():
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, 3, 8, dtype=torch.float64)
    return torch.randn(60, 8, generator=generator, dtype=torch.float64) * scales + 7


def test_raw_changes_nothing(features):
    assert torch.equal(fit_feature_map(features, "raw")(features), features)


def test_centered_has_largest_eigenvalue_one_and_the_same_condition_number(features):
    mapped = fit_feature_map(features, "centered")(features).numpy()
    values = np.linalg.eigvalsh(mapped.T @ mapped / 60)
    centred = (features - features.mean(0)).numpy()
    expected = np.linalg.svd(centred, compute_uv=False)
    assert values[-1] == pytest.approx(1, rel=1e-12)
    assert np.sqrt(values[-1] / values[0]) == pytest.approx(expected[0] / expected[-1], rel=1e-6)


def test_standardized_has_unit_standard_deviation(features):
    mapped = fit_feature_map(features, "standardized")(features).numpy()
    assert np.allclose(mapped.mean(0), 0, atol=1e-12)
    assert np.allclose(mapped.std(0), 1)


def test_whitened_has_identity_covariance(features):
    mapped = fit_feature_map(features, "whitened")(features).numpy()
    assert np.allclose(np.cov(mapped.T, bias=True), np.eye(8), atol=1e-9)


def test_whitened_with_fewer_rows_than_features_is_a_projection(features):
    mapped = fit_feature_map(features[:5], "whitened")(features[:5]).numpy()
    values = np.linalg.eigvalsh(mapped.T @ mapped / 5)
    assert np.allclose(values, [0, 0, 0, 0, 1, 1, 1, 1], atol=1e-9)


@pytest.mark.parametrize("kind", [kind for kind in FEATURE_MAPS if kind != "raw"])
def test_scale_and_offset_do_not_matter(features, kind):
    moved = features * 1e3 + 50
    assert torch.allclose(
        fit_feature_map(features, kind)(features), fit_feature_map(moved, kind)(moved), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("kind", [kind for kind in FEATURE_MAPS if kind != "raw"])
def test_features_without_variation_become_zero(kind):
    same = torch.full((6, 3), 0.1)
    assert torch.equal(fit_feature_map(same, kind)(same), torch.zeros(6, 3, dtype=torch.float64))


def test_a_constant_column_becomes_zero_and_spoils_no_other(features):
    with_constant = torch.cat([features, torch.full((60, 1), 3.0, dtype=torch.float64)], dim=1)
    mapped = fit_feature_map(with_constant, "standardized")(with_constant)
    assert torch.equal(mapped[:, 8], torch.zeros(60, dtype=torch.float64))
    assert torch.allclose(mapped[:, :8], fit_feature_map(features, "standardized")(features))


def test_unknown_map():
    with pytest.raises(SpectrumError, match="expected a feature map in .*got 'pca'"):
        fit_feature_map(torch.randn(4, 2), "pca")
