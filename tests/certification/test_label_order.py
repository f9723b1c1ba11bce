"""Utility is judged by class names, not by the order in which model and data happen to list them."""

from __future__ import annotations

import copy

import pytest
import torch

from hf_immunize.certification.utility import correct_rows, measure_utility
from hf_immunize.data import PixelDataset
from hf_immunize.errors import DataError, ModelError

NAMES = ["cat", "dog", "cow"]


@pytest.fixture
def trained(make_vit, make_pixels):
    """A classifier of three blobs that calls them by name, and its rows."""
    rows = make_pixels(60)
    model = make_vit()
    model.config.id2label = dict(enumerate(NAMES))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(pixel_values=rows.pixel_values, labels=rows.labels).loss.backward()
        optimizer.step()
    return model, PixelDataset(rows.pixel_values, rows.labels, NAMES, "test")


def reordered(rows: PixelDataset, order: list[int], names: list[str] | None = None) -> PixelDataset:
    """The same rows of a data set that lists its classes in another order."""
    places = torch.tensor(order).argsort()
    listed = [NAMES[label] for label in order] if names is None else names
    return PixelDataset(rows.pixel_values, places[rows.labels], listed, "test")


def test_another_order_of_names_changes_nothing(trained):
    model, rows = trained
    wanted = correct_rows(model, rows, is_base=True)
    assert sum(wanted) > 50
    for order in ([2, 1, 0], [1, 2, 0]):
        assert correct_rows(model, reordered(rows, order), is_base=True) == wanted


def test_a_subject_whose_outputs_were_moved_is_read_by_its_own_names(trained):
    base, rows = trained
    subject = copy.deepcopy(base)
    order = torch.tensor([2, 0, 1])
    subject.classifier.weight.data, subject.classifier.bias.data = (
        base.classifier.weight.data[order], base.classifier.bias.data[order])
    subject.config.id2label = {place: NAMES[int(label)] for place, label in enumerate(order)}
    found = measure_utility(base, subject, rows)
    assert found.base == found.immunized > 80 and found.drop.estimate == 0


@pytest.mark.parametrize("names", [["0", "1", "2"], ["Kuh", "Hund", "Katze"]])
def test_a_base_that_calls_classes_by_other_numbers_is_an_error_with_the_confusion(trained, names):
    model, rows = trained
    told = r"got them in another order: .* output 0 \('\w+'\) is '\w+' in \d+ of \d+ rows"
    with pytest.raises(DataError, match=told):
        correct_rows(model, reordered(rows, [2, 1, 0], names), is_base=True)


def test_names_that_do_not_match_are_said(trained):
    model, rows = trained
    with pytest.raises(ModelError, match=r"none for \['horse'\]; the model's other classes are \['cow'\]"):
        correct_rows(model, PixelDataset(rows.pixel_values, rows.labels, ["cat", "dog", "horse"], "test"))
