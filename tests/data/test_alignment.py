"""Classes are matched by name, and a base that calls them otherwise is found by what it says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_immunize.data import PixelDataset, align_labels, for_model, refuse_other_labels
from hf_immunize.errors import DataError, ModelError

ANIMALS = ["cat", "dog", "cow", "hen", "pig"]


def model_names(names):
    return dict(enumerate(names))


def test_names_decide_whatever_the_order():
    assert align_labels(["dog", "cat"], model_names(["cat", "dog"]), "test") == [1, 0]


@given(st.permutations(range(5)))
def test_every_order_is_undone(order):
    names = [ANIMALS[place] for place in order]
    assert [ANIMALS[place] for place in align_labels(names, model_names(ANIMALS), "test")] == names


@pytest.mark.parametrize("spelling", ["Freight Train", "freight_train", " freight  train", "FREIGHT-TRAIN"])
def test_case_space_and_joints_do_not_matter(spelling):
    assert align_labels([spelling, "bus"], model_names(["bus", "freight train"]), "test") == [1, 0]


def test_a_task_may_have_some_of_the_models_classes():
    assert align_labels(["pig", "cow"], model_names(ANIMALS), "test") == [4, 2]


def test_names_that_do_not_match_are_said():
    with pytest.raises(ModelError, match=r"none for \['Hund'\]; the model's other classes are \['dog'\]"):
        align_labels(["cat", "Hund"], model_names(["cat", "dog"]), "test")


def test_another_language_keeps_its_order_and_says_so(caplog):
    with caplog.at_level("WARNING", logger="hf_immunize.data.alignment"):
        assert align_labels(["Katze", "Hund"], model_names(["cat", "dog"]), "test") == [0, 1]
    assert "'Katze' is 'cat', 'Hund' is 'dog'" in caplog.text


def test_a_name_the_model_has_twice_is_refused():
    with pytest.raises(ModelError, match=r"several for \['crane'\]"):
        align_labels(["crane", "bus"], model_names(["crane", "Crane", "bus"]), "test")


def test_equal_lists_match_even_with_a_name_twice():
    assert align_labels(["crane", "crane"], model_names(["crane", "crane"]), "test") == [0, 1]


def test_without_names_on_one_side_places_stay():
    assert align_labels(["7", "3"], model_names(["cat", "dog"]), "test") == [0, 1]
    assert align_labels(["cat", "dog"], model_names(["LABEL_0", "LABEL_1"]), "test") == [0, 1]
    with pytest.raises(ModelError, match="3 classes of test, got 2: check primary_labels"):
        align_labels(["a", "b", "c"], model_names(["LABEL_0", "LABEL_1"]), "test")


def test_numbers_are_names_where_both_sides_have_them():
    assert align_labels(["4", "3", "2", "1", "0"], model_names("01234"), "test") == [4, 3, 2, 1, 0]


def test_rows_get_the_models_labels():
    rows = PixelDataset(torch.zeros(3, 1, 2, 2), torch.tensor([0, 1, 1]), ["pig", "cat"], "test")
    found = for_model(rows, model_names(ANIMALS))
    assert found.labels.tolist() == [4, 0, 0] and found.label_names == ANIMALS
    assert for_model(found, model_names(ANIMALS)) is found


def noisy(labels, classes, share, seed=0):
    """Predictions that are right for about ``1 - share`` of the rows."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(classes, labels.shape, generator=generator)
    return torch.where(torch.rand(labels.shape, generator=generator) < share, drawn, labels)


@pytest.mark.parametrize("order", [[4, 3, 2, 1, 0], [1, 2, 3, 4, 0], [1, 0, 2, 3, 4]])
@pytest.mark.parametrize("share", [0.02, 0.4])
def test_a_model_that_calls_classes_otherwise_is_found(order, share):
    labels = torch.arange(400) % 5
    predicted = torch.tensor(order)[noisy(labels, 5, share)]
    wrong = next(place for place in range(5) if order[place] != place)
    told = rf"output {order[wrong]} \('{ANIMALS[order[wrong]]}'\) is '{ANIMALS[wrong]}'"
    with pytest.raises(DataError, match=told):
        refuse_other_labels(predicted, labels, ANIMALS, "test")


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.0, 1.0), st.integers(2, 30), st.integers(2, 300))
def test_good_middling_and_untrained_models_are_not_accused(seed, share, classes, rows):
    labels = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed))
    names = [str(label) for label in range(classes)]
    assert refuse_other_labels(noisy(labels, classes, share, seed), labels, names, "test") is None


def test_one_answer_to_everything_is_no_other_order():
    labels = torch.tensor([0] * 10 + [1] * 190)
    assert refuse_other_labels(torch.zeros(200, dtype=torch.long), labels, ["a", "b"], "test") is None


def test_composed_and_decomposed_letters_are_the_same():
    """As a file system and a config may spell them."""
    assert align_labels(["Ku\u0308he", "bus"], model_names(["bus", "k\u00fche"]), "test") == [1, 0]
