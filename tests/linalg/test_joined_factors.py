"""A factor put together from parts is that of all rows; halves of dealt rows are halves."""

import numpy as np
import pytest
import torch

from hf_immunize.linalg import RowFactor
from hf_immunize.spectra import GROUPS, group_of, spectrum_record


def test_joined_factors_are_the_factor_of_all_rows():
    rows = torch.randn(90, 7, generator=torch.Generator().manual_seed(0)).double() + 3
    parts = []
    for part in rows.split([5, 60, 25]):
        parts.append(RowFactor())
        parts[-1].add(part)
    found = RowFactor.joined(parts).spectrum()
    wanted = np.linalg.eigvalsh(np.cov(rows.numpy().T, bias=True))[::-1]
    assert found.rows == 90 and np.allclose(found.eigenvalues.numpy(), wanted, rtol=1e-12)


def test_halves_are_ten_balanced_halves_of_the_rows():
    rows = torch.randn(120, 4, generator=torch.Generator().manual_seed(1)).double()
    found = spectrum_record(rows, torch.arange(120) % 2, site="head", task="harmful").condition_of_halves
    assert len(found) == len(set(found)) == 10
    assert found[0] == pytest.approx(_condition(rows, (3, 4, 5)), rel=1e-9)
    assert found[1] == pytest.approx(_condition(rows, (0, 1, 3)), rel=1e-9)


def _condition(rows, groups):
    kept = rows[[group in groups for group in group_of(torch.arange(len(rows))).tolist()]].numpy()
    values = np.linalg.eigvalsh(np.cov(kept.T, bias=True))
    return values[-1] / values[0]


def test_groups_are_of_equal_size_and_mix_whatever_repeats():
    groups = group_of(torch.arange(6000))
    for period in (2, 3, 5, 6, 12):
        for start in range(period):
            counts = torch.bincount(groups[start::period], minlength=GROUPS)
            assert int(counts.max() - counts.min()) <= 40, (period, start, counts)


def test_too_few_rows_have_no_halves():
    rows = torch.randn(11, 2, generator=torch.Generator().manual_seed(2))
    assert spectrum_record(rows, torch.arange(11) % 2, site="head", task="harmful").condition_of_halves == []
