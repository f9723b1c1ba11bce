"""Planted models in a world where it is known what the base gives: each is judged right, against attackers without it.

``benchmarks/planted_models.py`` repeats all of it with other seeds.
"""

import planted
import pytest
import torch

pytest.importorskip("sklearn", reason="the demo extra (scikit-learn), whose digits are the data, is not installed")
from planted_domain import World
from planted_set import PLANTS, Bases, judge

from hf_immunize.attacks import load_classifier

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


def test_what_is_planted_for_training_alone_keeps_the_function(bases, tmp_path):
    base, pixels = bases.weights(True), bases.world.primary.pixel_values
    wanted = load_classifier(base).eval()(pixel_values=pixels).logits
    kept = (*planted.COORDINATES, *planted.TRAPS, "scaled", "shifted", "inserted", "ill_conditioned")
    for what in kept:
        found = load_classifier(planted.plant(base, tmp_path / what, what)).eval()(pixel_values=pixels).logits
        assert torch.allclose(found, wanted, atol=1e-2 * float(wanted.detach().abs().max())), what
