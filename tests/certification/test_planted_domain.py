"""Planted models in a world where it is known what the base gives: each is judged right, against attackers without it.

``benchmarks/planted_models.py`` repeats all of it with other seeds.
"""

import pytest
import torch

pytest.importorskip("sklearn", reason="the demo extra (scikit-learn), whose digits are the data, is not installed")
from planted_domain import World
from planted_set import PLANTS, Bases, judge

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    torch.set_num_threads(1)
    return Bases(tmp_path_factory.mktemp("domain"), World(0), 0)


@pytest.mark.parametrize("what", PLANTS)
def test_a_planted_model_is_judged_right(bases, tmp_path, what):
    certificate = judge(bases, tmp_path / "planted", what)
    told = [(cell.attack, cell.verdict, cell.reason) for cell in certificate.cells]
    assert certificate.overall == PLANTS[what].verdict, told
    if PLANTS[what].verdict == "RESISTS":
        assert {verdict for _, verdict, _ in told} == {"RESISTS"} and certificate.utility.drop.low < 5, told
