"""The two equalities of tests, on numbers whose distance is known."""

import math

import numpy as np
import pytest
import torch
from equality import rounding, same_bits, units_apart


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_unit_is_eps_of_the_largest_value(dtype):
    truth, eps = torch.tensor([8.0, -1.0], dtype=dtype), torch.finfo(dtype).eps
    found = truth.clone()
    found[0] += 8 * eps
    assert units_apart(found, truth) == 1 and units_apart(found, truth, scale=1.0) == 8
    assert rounding(1, 8.0, dtype) == 8 * eps
    assert units_apart(truth, truth.clone()) == 0 and same_bits(truth, truth.clone()) and not same_bits(found, truth)


def test_other_shapes_dtypes_names_and_nan_are_infinitely_far():
    truth = {"a": torch.ones(3), "b": torch.arange(3)}
    assert same_bits({name: value.clone() for name, value in truth.items()}, truth)
    assert units_apart({**truth, "a": truth["a"] * (1 + 3 * torch.finfo(torch.float32).eps)}, truth) == pytest.approx(3)
    wrong = [truth["a"].double(), torch.ones(1, 3), torch.tensor([1.0, math.nan, 1.0])]
    for found in [{**truth, "a": value} for value in wrong] + [{**truth, "b": truth["b"] + 1}, {"a": truth["a"]}]:
        assert units_apart(found, truth) == math.inf and not same_bits(found, truth)
    assert units_apart(np.zeros(2), np.zeros(2)) == 0 and units_apart(np.ones(2), np.zeros(2)) == math.inf
