"""The outcome of training is measured on harmful rows that training has not seen, where there are enough of them."""

import pytest

from hf_immunize.data import HARMFUL_SPLITS, parse_fractions
from hf_immunize.stages.checks.rows import Side
from hf_immunize.stages.workflow.draft_classifier import splits_with_probe


def side(counts):
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    return Side("harmful", None, "image", range(len(labels)), labels, [str(label) for label in set(labels)],
                HARMFUL_SPLITS)


def test_a_part_of_the_defenders_rows_is_held_out_and_the_attackers_stay_as_they_are():
    found = parse_fractions(splits_with_probe(side([300, 200])))
    assert found == {"defense": 0.3, "probe": 0.05, "attack": 0.35, "validation": 0.1, "test": 0.2}
    order = list(found)
    assert order.index("probe") == 1, "cut out of the defender's rows: those of the others do not move"
    assert sum(found[name] for name in ("defense", "probe")) == pytest.approx(HARMFUL_SPLITS["defense"])


@pytest.mark.parametrize("least, share", [(200, 0.05), (120, 0.05), (60, 0.1), (30, 0.15)])
def test_small_classes_give_a_larger_share_so_that_about_six_rows_of_each_tell(least, share):
    found = parse_fractions(splits_with_probe(side([least, 300])))
    assert found["probe"] == pytest.approx(share) and found["defense"] == pytest.approx(0.35 - share)


@pytest.mark.parametrize("counts, held", [
    ([120, 120], True), ([60, 500], True), ([27, 27], True), ([26, 500], False), ([8, 8], False)])
def test_classes_of_few_images_are_all_trained_on(counts, held):
    assert (splits_with_probe(side(counts)) is not None) == held
