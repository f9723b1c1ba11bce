import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_builders import block_pair, gaussian

from hf_immunize.errors import SpectrumError
from hf_immunize.linalg.factor import factor_features, factor_moment
from hf_immunize.linalg.pencil import common_pencil, union_basis


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 8), seed=st.integers(0, 10_000), spread=st.floats(0, 3))
def test_full_rank_values_are_those_of_scipy(width, seed, spread):
    scale = torch.logspace(0, spread, width, dtype=torch.float64)
    primary, harmful = gaussian(seed, width + 5, width) * scale, gaussian(seed + 1, width + 5, width)
    pencil = common_pencil(factor_features(primary), factor_features(harmful))
    truth = scipy.linalg.eigh((harmful.T @ harmful).numpy(), (primary.T @ primary).numpy(), eigvals_only=True)
    np.testing.assert_allclose(pencil.values_C.numpy(), truth[::-1], rtol=1e-6)


@st.composite
def singular_pairs(draw):
    """K_P and K_H with a known number of common, own and unseen directions, in a random non-orthogonal basis."""
    sizes = [draw(st.integers(1, 4)), *(draw(st.integers(0, 3)) for _ in range(3))]
    return sizes, draw(st.integers(0, 10_000))


@settings(max_examples=80, deadline=None)
@given(singular_pairs())
def test_blocks_and_values_of_pairs_whose_ranges_differ(pair):
    sizes, seed = pair
    rows_p, rows_h, mu = block_pair(sizes, seed)
    pencil = common_pencil(*(factor_features(rows, tolerance=1e-9) for rows in (rows_p, rows_h)))
    found = [pencil.common_DC, pencil.primary_only_DP, pencil.harmful_only_DH, pencil.neither_DO]
    assert [block.shape[1] for block in found] == sizes
    np.testing.assert_allclose(pencil.values_C.numpy(), mu.numpy(), rtol=1e-6)
    basis = torch.cat(found, dim=1)
    assert torch.linalg.matrix_rank(basis) == sum(sizes)
    ones = [torch.ones(n).double() for n in sizes]
    wanted_p = torch.cat([ones[0], ones[1], 0 * ones[2], 0 * ones[3]])
    wanted_h = torch.cat([pencil.values_C, 0 * ones[1], ones[2], 0 * ones[3]])
    for rows, wanted in ((rows_p, wanted_p), (rows_h, wanted_h)):
        mapped = rows @ basis
        torch.testing.assert_close(mapped.T @ mapped, torch.diag(wanted), atol=1e-6, rtol=1e-6)
    assert union_basis(*(factor_features(r, tolerance=1e-9) for r in (rows_p, rows_h))).shape[1] == sum(sizes[:3])


@settings(max_examples=40, deadline=None)
@given(singular_pairs())
def test_values_do_not_change_under_an_invertible_extractor(pair):
    sizes, seed = pair
    rows_p, rows_h, mu = block_pair(sizes, seed)
    theta = gaussian(seed + 2, sum(sizes), sum(sizes)) + 2 * torch.eye(sum(sizes), dtype=torch.float64)
    pencil = common_pencil(*(factor_features(rows @ theta, tolerance=1e-9) for rows in (rows_p, rows_h)))
    np.testing.assert_allclose(pencil.values_C.numpy(), mu.numpy(), rtol=1e-5)


def test_a_projection_onto_the_common_range_is_not_invariant():
    """Why the Schur complement: projecting inputs gives another number for the same tasks in another basis."""
    rows_p, rows_h, mu = block_pair([2, 1, 1, 0], 3)

    def projected(a, b):
        null = torch.cat([factor_features(m, tolerance=1e-9).null_DZ for m in (a, b)], dim=1)
        keep = torch.linalg.qr(null, mode="complete")[0][:, null.shape[1] :]
        values = scipy.linalg.eigh(*(((m @ keep).T @ (m @ keep)).numpy() for m in (b, a)), eigvals_only=True)
        return values[-1] / values[0]

    theta = gaussian(5, 4, 4)
    one, other = projected(rows_p, rows_h), projected(rows_p @ theta, rows_h @ theta)
    assert abs(one / other - 1) > 0.01
    assert common_pencil(
        *(factor_features(m @ theta, tolerance=1e-9) for m in (rows_p, rows_h))
    ).condition_number == pytest.approx(float(mu[0] / mu[-1]), rel=1e-6)


def test_rounding_of_an_ill_conditioned_task_invents_no_direction():
    """A null space is known only to eps·κ(X): what the other task seems to see of it by that angle is no signal."""
    generator = torch.Generator().manual_seed(0)
    right = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]
    primary = torch.diag(torch.tensor([1e3, 1.0, 1e-5])).double() @ right[:, :3].T
    harmful = torch.randn(20, 3, generator=generator, dtype=torch.float64) @ right[:, :3].T
    pencil = common_pencil(factor_features(primary), factor_features(harmful))
    assert pencil.harmful_only_DH.shape[1] == 0 and pencil.values_C.shape[0] == 3
    assert pencil.dropped < pencil.tolerance < pencil.smallest_kept == 1.0


def test_disjoint_ranges_and_unequal_widths_are_refused():
    primary, harmful = torch.diag(torch.tensor([1.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0]))
    with pytest.raises(SpectrumError, match="share none"):
        common_pencil(factor_moment(primary), factor_moment(harmful))
    with pytest.raises(SpectrumError, match="one width"):
        common_pencil(factor_moment(primary), factor_moment(torch.eye(3)))
