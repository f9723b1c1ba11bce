"""Planted models in a world where it is known what the base gives: each is judged right, against attackers without it.

``benchmarks/planted_models.py`` repeats all of it with other seeds.
"""

import pytest
import torch

pytest.importorskip("sklearn", reason="the demo extra (scikit-learn), whose digits are the data, is not installed")
from planted_domain import PLANTS, World, judge, sit

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world():
    torch.set_num_threads(1)
    return World(0)


@pytest.fixture(scope="module")
def base(tmp_path_factory, world):
    return sit(tmp_path_factory.mktemp("domain"), world, 0)


@pytest.mark.parametrize("what", PLANTS)
def test_a_planted_model_is_judged_right(base, world, tmp_path, what):
    certificate = judge(base, tmp_path / "planted", world, what, 0)
    told = [(cell.attack, cell.verdict, cell.reason) for cell in certificate.cells]
    assert certificate.overall == PLANTS[what].verdict, told
    if PLANTS[what].verdict == "RESISTS":
        assert {verdict for _, verdict, _ in told} == {"RESISTS"} and certificate.utility.drop.low < 5, told
