"""Labels of every type become the right classes; rows without one are counted; classes are chosen by name or id."""

from __future__ import annotations

import datetime
from decimal import Decimal

import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, DatasetInfo, Features, Sequence, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from image_builders import noise, table, write_classes

from hf_immunize.data import (
    Classes,
    Task,
    TaskArguments,
    label_names_of,
    labels_of,
    parse_labels,
    read_classes,
    select_classes,
)
from hf_immunize.errors import DataError

NAMES = ["cat", "dog", "10", "2", "Äpfel", "a, b"]


def rows(values, feature=None) -> Dataset:
    """A label column, and the place of each row beside it."""
    features = {"label": feature, "row": Value("int64")}
    data = {"label": values, "row": list(range(len(values)))}
    return Dataset.from_dict(data, Features(features) if feature is not None else None)


def selected(values, feature=None, labels=None) -> tuple[list[tuple[str, int]], list[str]]:
    """Name of the class and row of what is kept, and the names."""
    kept, names = select_classes(rows(values, feature), labels, label_column="label", name="the data")
    return [(names[label], row) for label, row in zip(kept["label"][:], kept["row"][:], strict=True)], names


@pytest.mark.parametrize("values,feature,named", [
    ([1, 0, -1, 1], ClassLabel(names=["x", "y"]), ["y", "x", None, "y"]),
    ([1, 0, None, 1], ClassLabel(names=["x", "y"]), ["y", "x", None, "y"]),
    ([2, 7, None, -1], Value("int64"), ["2", "7", None, None]),
    ([2, 7], Value("uint8"), ["2", "7"]),
    ([2.0, 7.0, float("nan"), None, -1.0], Value("float32"), ["2", "7", None, None, None]),
    (["b", "a", None, "", "  "], Value("string"), ["b", "a", None, None, None]),
    (["b", "a"], Value("large_string"), ["b", "a"]),
    (["10", "9", "1"], Value("string"), ["10", "9", "1"]),
    ([True, False, None], Value("bool"), ["True", "False", None]),
    ([Decimal("3"), Decimal("1")], Value("decimal128(5, 0)"), ["3", "1"]),
])
def test_labels_of_each_type_become_classes_and_rows_without_one_are_counted(values, feature, named, warned):
    kept, names = selected(values, feature)
    assert kept == [(name, row) for row, name in enumerate(named) if name is not None]
    none = named.count(None)
    told = f"the data: left out {none} of {len(values)} rows, which have no label."
    assert warned() == ([told] if none else [])
    assert len(set(names)) == len(names) == len({name for name in named if name is not None})


@settings(max_examples=80, deadline=None)
@given(
    picks=st.lists(st.one_of(st.none(), st.integers(0, 5)), min_size=2, max_size=30),
    kind=st.sampled_from(["classes", "int", "float", "text", "bool", "digits"]),
    none=st.sampled_from([None, -1, float("nan"), ""]),
)
def test_every_type_and_order_of_labels_gives_each_row_its_name(picks, kind, none):
    """Whichever order, gaps and missing labels: each row keeps its own name, ids follow the order of names."""
    made = {
        "classes": (lambda pick: pick, NAMES.__getitem__, ClassLabel(names=NAMES)),
        "int": (lambda pick: 3 * pick, lambda pick: str(3 * pick), Value("int32")),
        "float": (lambda pick: 3.0 * pick, lambda pick: str(3 * pick), Value("float64")),
        "text": (NAMES.__getitem__, NAMES.__getitem__, Value("string")),
        "bool": (lambda pick: pick > 2, lambda pick: str(pick > 2), Value("bool")),
        "digits": (lambda pick: str(3 * pick), lambda pick: str(3 * pick), Value("string")),
    }
    value, name, feature = made[kind]
    fits = {"classes": (None, -1), "int": (None, -1), "float": (None, -1, float("nan")), "text": (None, ""),
            "bool": (None,), "digits": (None, "")}
    gap = none if any(none is each or none == each for each in fits[kind]) else None
    values = [gap if pick is None else value(pick) for pick in picks]
    expected = [(name(pick), row) for row, pick in enumerate(picks) if pick is not None]
    if len({called for called, _ in expected}) < 2:
        with pytest.raises(DataError, match="at least two classes"):
            selected(values, feature)
        return
    kept, names = selected(values, feature)
    assert kept == expected
    if kind == "classes":
        assert names == sorted(names, key=NAMES.index)
    else:
        assert names == sorted(names, key=int if all(called.isdigit() for called in names) else str)


@pytest.mark.parametrize("values,feature,message", [
    ([0.5, 1.0], Value("float64"), r"expected whole numbers .* got 0.5 in row 0 \(1 such rows\)"),
    ([1.0, float("inf")], Value("float64"), "got inf in row 1"),
    ([0, -2, 1, -3], Value("int64"), r"got -2 in row 1, -3 in row 3 \(2 such rows\)"),
    ([[0], [1, 2]], Sequence(Value("int64")), r"got \[0\]: several labels for one image are not supported"),
    ([["a"], ["b"]], None, r"got \['a'\]: several labels"),
    ([{"a": 1}, {"a": 0}], None, "several labels"),
    ([datetime.date(2020, 1, 1)] * 2, None, "got 'date32': convert it"),
    ([b"a", b"b"], Value("binary"), "got 'binary': convert it"),
    ([None, None], Value("null"), r"at least two classes in the data, got \[\] and 2 rows without a label"),
    ([-1, 1, 1], Value("int64"), r"at least two classes in the data, got \['1'\] and 1 rows without a label"),
])
def test_labels_that_name_no_class_are_refused_with_their_rows(values, feature, message):
    with pytest.raises(DataError, match=message):
        selected(values, feature)


def test_a_number_beyond_the_names_of_a_class_label_names_its_row():
    stored = pa.table({"label": [0, 1, 2]})
    broken = Dataset(stored, info=DatasetInfo(features=Features({"label": ClassLabel(names=["x", "y"])})))
    with pytest.raises(DataError, match=r"labels in 0..1 in column 'label' of the data, got 2 in row 2"):
        read_classes(broken, "label", "the data")


def test_folders_by_number_are_chosen_by_their_number_and_told(tmp_path, warned):
    source = str(write_classes(tmp_path / "d", map(str, range(12)), each=6))
    task = Task(TaskArguments("unused", source, harmful_labels="2,10", harmful_splits="attack=0.5,test=0.5"), "harmful")
    assert task.label_names == ["2", "10"]
    assert warned() == ["the harmful dataset: chosen classes, by id and name: 2 '2', 10 '10'."]


CLASSES = Classes([0, 1, 2, 3, 4, 5], dict(enumerate(NAMES)))
COUNTED = Classes([], {place: str(place + 1) for place in range(12)})


@pytest.mark.parametrize("given,classes,ids", [
    ("dog,cat", CLASSES, [1, 0]),
    ("cat, 1", CLASSES, [0, 1]),
    ("0,1", CLASSES, [0, 1]),
    (["dog", "a, b"], CLASSES, [1, 5]),
    ([1, "cat"], CLASSES, [1, 0]),
    ('"a, b",cat', CLASSES, [5, 0]),
    ("a, b", CLASSES, [5]),
    ("A\u0308pfel,dog", CLASSES, [4, 1]),
    ("10,2", CLASSES, [2, 3]),
    (9, Classes([], {9: "9"}), [9]),
    ("2,10", COUNTED, [1, 9]),
    ("2,10", Classes([], {number: str(number) for number in range(12)}), [2, 10]),
    (None, CLASSES, None),
])
def test_classes_are_chosen_by_name_and_where_none_is_called_so_by_id(given, classes, ids):
    assert parse_labels(given, classes, "the data") == ids


@pytest.mark.parametrize("given,classes,message", [
    ("0,2", COUNTED, r"got '2': class 1 '2' by its name, or 2 '3' by its id, as '0' beside it is one"),
    ("a,b", Classes([], {0: "a,b", 1: "a", 2: "b"}), r"got 'a,b': one class of that name, or the classes \['a', 'b'\]"),
    ("Äpfel", Classes([], {0: "A\u0308pfel", 1: "Äpfel"}), None),
    ("bird,cat", CLASSES, r"comma-separated class ids or names .* \['bird'\] .* double quotes.* It has 6 classes: cat"),
    ("Cat", CLASSES, r"got \['Cat'\]"),
    ("", CLASSES, r"got \[''\]"),
    ("cat,,dog", CLASSES, r"got \[''\]"),
    ("cat,0", CLASSES, r"each class of the data once, got \[0\] again"),
    (True, CLASSES, "got True: put it in quotes"),
    ([True], CLASSES, "got True: put it in quotes"),
    ([2.0], CLASSES, "got 2.0: put it in quotes"),
    ({"cat": 1}, CLASSES, "put it in quotes"),
    ("a\nb", CLASSES, "comma-separated class ids or names"),
])
def test_what_can_be_read_two_ways_or_not_at_all_is_refused(given, classes, message):
    if message is None:
        assert parse_labels(given, classes, "the data") == [1]
        return
    with pytest.raises(DataError, match=message):
        parse_labels(given, classes, "the data")


def test_a_yaml_list_of_names_reaches_the_task(tmp_path):
    from hf_immunize.certification.bench import read_options, task_arguments
    from hf_immunize.options import parse_options

    source = str(write_classes(tmp_path / "d", ["a, b", "c", "d"], each=6))
    (tmp_path / "task.yaml").write_text(
        f"primary_dataset: {source}\nharmful_dataset: {source}\nharmful_labels: ['a, b', d]\nprimary_labels: [0, 1]\n"
        "harmful_splits: attack=0.5,test=0.5\nsplit_seed: 1\ndrop_rare_classes: false\n"
    )
    (arguments,) = parse_options((TaskArguments,), ["--config", str(tmp_path / "task.yaml")])
    assert arguments == task_arguments(read_options(tmp_path / "task.yaml"))[1]
    assert Task(arguments, "harmful").label_names == ["a, b", "d"]


@pytest.mark.parametrize("labels,message", [
    ([0, 1.5], "got 1.5 in row 1"), ([0, 1, None], "got None in row 2"), ([0, float("nan")], "got nan in row 1"),
    ([0, float("inf")], "got inf in row 1"), ([1, [2]], r"got \[2\] in row 1"),
])
def test_labels_of_a_users_dataset_that_are_no_numbers_name_their_own_row(labels, message):
    with pytest.raises(DataError, match=message):
        labels_of([{"labels": label} for label in labels], "harmful_dataset")
    assert labels_of([{"labels": label} for label in (0, 1.0, True, "3")], "x") == [0, 1, 1, 3]


def test_classes_keep_their_names_in_the_selected_table():
    data = table(6, names=("x", "y", "z"))
    assert label_names_of(data) == ["x", "y", "z"]
    kept, names = select_classes(data, [2, 0], label_column="label", name="the data")
    assert names == ["z", "x"] and [row["image"].tobytes() for row in kept] == [
        noise(number).tobytes() for number in (0, 2, 3, 5)
    ]
    assert kept["label"][:] == [1, 0, 1, 0]
