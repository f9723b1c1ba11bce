"""Both metric modes, and parity of the second with what the public reference code printed."""

import json
import math

import numpy as np
import pytest
import torch
from linear_builders import gaussian, shared_folder, spread_rows

from hf_immunize.errors import ConfigError, SpectrumError
from hf_immunize.linear import condition, paper_log_condition, relative_immunization_ratio


def test_rank_aware_ratio_of_matrices_we_built():
    def rows(kappa):
        return torch.diag(torch.tensor([math.sqrt(kappa), 1.0, 0.0])).double()

    ratio = relative_immunization_ratio((rows(100), rows(50)), (rows(10), rows(500)))
    assert ratio.ratio == pytest.approx(100) and ratio.ranks == (2, 2, 2, 2)
    assert (ratio.harmful_ratio, ratio.primary_ratio) == pytest.approx((10, 0.1))
    assert "rank-aware" in ratio.label


def test_scaling_features_changes_only_the_paper_faithful_ratio():
    """Where an eigenvalue is far below 1e-6 the printed κ is about σ_max/1e-6, so a scale becomes an RIR.

    The eigenvalue is 9e-10 and not 0: of 0 + 1e-6, rounding decides whether the reference code counts it.
    """
    primary = spread_rows(0, 20, 5, 0.5)
    harmful = torch.diag(torch.tensor([3.0, 2.0, 1.5, 1.0, 3e-5], dtype=torch.float64))
    scaled = (primary, 3 * harmful)
    right = relative_immunization_ratio((primary, harmful), scaled)
    paper = relative_immunization_ratio((primary, harmful), scaled, mode="paper-faithful")
    assert right.ratio == pytest.approx(1)
    kappa = [(9 * scale + 1e-6) / (9e-10 * scale + 1e-6) for scale in (1, 9)]
    assert paper.ratio == pytest.approx(kappa[1] / kappa[0], rel=1e-6) and paper.ratio > 8
    assert "not a condition number" in paper.label and paper.ranks is None


def test_paper_mode_equals_rank_aware_on_healthy_matrices():
    rows = spread_rows(0, 50, 5, 0.5) * 1e3
    kappa, _ = condition(rows, "rank-aware", is_moment=False)
    assert math.exp(paper_log_condition(rows.T @ rows)) == pytest.approx(kappa)


def test_group_means_average_ratios_over_the_same_rows():
    before = (spread_rows(0, 60, 4, 0.5), spread_rows(1, 80, 4, 0.5))
    theta = gaussian(3, 4, 4)
    after = tuple(m @ theta for m in before)
    found = relative_immunization_ratio(before, after, groups=3, group_rows=20, seed=7)
    generator, ratios = torch.Generator().manual_seed(7), []
    for _ in range(3):
        parts = []
        for old, new in zip(before, after, strict=True):
            pick = torch.randperm(len(old), generator=generator)[:20]
            for matrix in (old, new):
                sigma = np.linalg.svd(matrix[pick].numpy(), compute_uv=False)
                parts.append((sigma[0] / sigma[-1]) ** 2)
        ratios.append((parts[3] / parts[2]) / (parts[1] / parts[0]))
    assert found.ratio == pytest.approx(np.mean(ratios)) and found.groups == 3


def test_requests_that_cannot_be_met_are_refused():
    pair = (torch.eye(3).double(), torch.eye(3).double())
    with pytest.raises(ConfigError, match="rank-aware"):
        relative_immunization_ratio(pair, pair, mode="other")
    with pytest.raises(ConfigError, match="per-group"):
        relative_immunization_ratio(pair, pair, is_moment=True, groups=2)
    with pytest.raises(SpectrumError, match="at least 100 rows"):
        relative_immunization_ratio(pair, pair, groups=2)
    with pytest.raises(SpectrumError, match="same rows"):
        relative_immunization_ratio(pair, (torch.eye(3)[:2], torch.eye(3)))
    with pytest.raises(SpectrumError, match="above 1e-6"):
        paper_log_condition(torch.zeros(2, 2))
    with pytest.raises(SpectrumError, match="finite square"):
        paper_log_condition(torch.ones(2, 3))


@pytest.fixture
def reference():
    folder = shared_folder("reference")
    return json.loads((folder / "house_price_seed1.json").read_text()), np.load(folder / "house_price_seed1.npz")


def test_paper_faithful_mode_prints_what_the_reference_printed(reference):
    told, arrays = reference
    before = tuple(torch.from_numpy(arrays[f"X_{task}"]) for task in ("primary", "harmful"))
    weight, bias = torch.from_numpy(arrays["weight"]), torch.from_numpy(arrays["bias"])
    after = tuple(rows @ weight.T + bias for rows in before)
    found = relative_immunization_ratio(before, after, mode="paper-faithful")
    printed = told["reference_printed"]
    got = (found.primary_before, found.primary_after, found.harmful_before, found.harmful_after, found.ratio)
    wanted = tuple(printed[key] for key in ("X1", "A1", "X2", "A2", "immunization_gap"))
    assert got == pytest.approx(wanted, rel=1e-6)


def test_true_values_beside_the_printed_ones(reference):
    """The rows were computed in float32, which sets the rank tolerance: 74 of 79, and other condition numbers."""
    told, arrays = reference
    true = told["true"]
    for task in ("primary", "harmful"):
        rows = torch.from_numpy(arrays[f"X_{task}"])
        tolerance = max(rows.shape) * torch.finfo(torch.float32).eps
        kappa, rank = condition(rows, "rank-aware", is_moment=False, tolerance=tolerance)
        assert (kappa, rank) == pytest.approx(true[f"kappa_K_{task}"], rel=1e-6)
        through = rows @ torch.from_numpy(arrays["weight"]).T + torch.from_numpy(arrays["bias"])
        kappa, rank = condition(through, "rank-aware", is_moment=False, tolerance=1e-5)
        assert (kappa, rank) == pytest.approx(true[f"kappa_H_{task}"], rel=1e-6)
