"""Labels of any column type as classes with names, rows without a label left out, and classes chosen by name or id."""

from __future__ import annotations

import csv
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.utils import logging

from hf_immunize.errors import DataError

logger = logging.get_logger(__name__)

NO_LABEL = -1
"""What data sets write where a row has no label."""


@dataclass(frozen=True)
class Classes:
    """The class of every row of a dataset.

    Args:
        ids: one for each row, None for a row without a label.
        names: name of each id that may be asked for, in order: every class of a ClassLabel column, else those present.
    """

    ids: list[int | None]
    names: dict[int, str]

    @property
    def present(self) -> list[int]:
        """Ids that some row has, in the order of ``names``."""
        found = set(self.ids)
        return [label for label in self.names if label in found]

    def labelled(self, name: str) -> list[int]:
        """Rows that have a label; how many of ``name`` have none is told in one line."""
        rows = [row for row, label in enumerate(self.ids) if label is not None]
        if left := len(self.ids) - len(rows):
            logger.warning(f"{name}: left out {left} of {len(self.ids)} rows, which have no label.")
        return rows

    def named(self, labels: Sequence[int]) -> str:
        """``2 'car', 10 'bus'``."""
        return ", ".join(f"{label} {self.names[label]!r}" for label in labels)


def read_classes(dataset: Any, column: str, name: str) -> Classes:
    """The classes in a label column: a ClassLabel's, whole numbers, or the sorted texts or truth values.

    Ids are those of the ClassLabel, the numbers themselves, or places in the sorted names (numbers by value). None,
    NaN, -1 and empty text are no label.

    Raises:
        DataError: lists of labels (several for one image), numbers that are not whole or are below -1, a number beyond
            the names of a ClassLabel, or a type that names no class; rows are named.
    """
    from datasets import ClassLabel, Value

    feature, values = dataset.features[column], dataset[column][:]
    kind = feature.dtype if isinstance(feature, Value) else type(feature).__name__
    if isinstance(feature, ClassLabel):
        return _of_numbers(values, name, column, dict(enumerate(feature.names)))
    if kind == "null":
        return Classes([None] * len(values), {})
    if kind.startswith(("int", "uint", "float", "decimal")):
        return _of_numbers(values, name, column, None)
    if kind in ("bool", "string", "large_string", "string_view"):
        return _of_texts(values)
    several = any(isinstance(value, list | dict) for value in values)
    hint = "several labels for one image are not supported: choose one, or" if several else "convert it, or choose"
    raise DataError(
        f"expected one whole number, text or truth value as the label of each row in column '{column}' of {name}, got "
        f"{values[0] if several else kind!r}: {hint} another label_column."
    )


def _of_numbers(values: Sequence[Any], name: str, column: str, known: dict[int, str] | None) -> Classes:
    ids: list[int | None] = []
    bad = []
    for row, value in enumerate(values):
        if value is None or value == NO_LABEL or math.isnan(value):
            ids.append(None)
        elif math.isinf(value) or value != int(value) or value < 0 or (known is not None and int(value) not in known):
            bad.append((row, value))
        else:
            ids.append(int(value))
    if bad:
        wanted = "whole numbers from 0 on" if known is None else f"labels in 0..{len(known) - 1}"
        told = ", ".join(f"{value!r} in row {row}" for row, value in bad[:5])
        raise DataError(
            f"expected {wanted} in column '{column}' of {name}, got {told} ({len(bad)} such rows): repair the labels; "
            "a row without one has None, NaN or -1."
        )
    there = {label for label in ids if label is not None}
    return Classes(ids, known if known is not None else {label: str(label) for label in sorted(there)})


def _of_texts(values: Sequence[Any]) -> Classes:
    texts = [None if value is None or not str(value).strip() else str(value) for value in values]
    names = in_order({text for text in texts if text is not None})
    places = {text: place for place, text in enumerate(names)}
    return Classes([None if text is None else places[text] for text in texts], dict(enumerate(names)))


def in_order(names: set[str]) -> list[str]:
    """Names in the order of their class ids: numbers by value where all are numbers, else as text."""
    if all(name.isascii() and name.isdigit() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def parse_labels(given: Any, classes: Classes, name: str) -> list[int] | None:
    """Class ids from what a user wrote: names or ids joined with commas, or a list.

    A name with a comma in it stands in double quotes. Each entry is a name where a class is called exactly so, else an
    id, whether or not a row has it. None where nothing was given.

    Raises:
        DataError: an entry that is neither, a class chosen twice, or entries some of which are names and others ids, if
            one that is a name is the id of another class as well: both readings are told.
    """
    if given is None:
        return None
    entries = _entries(given, classes, name)
    named = [_called(entry, classes, name) for entry in entries]
    numbered = [int(entry) if re.fullmatch(r"-?[0-9]+", entry) else None for entry in entries]
    pairs = list(zip(entries, named, numbered, strict=True))
    if unknown := [entry for entry, *read in pairs if read == [None, None]]:
        raise _unknown(given, unknown, classes, name)
    ids_alone = [entry for entry, label, _ in pairs if label is None]
    for entry, label, other in pairs:
        if ids_alone and label is not None and other in classes.names and label != other:
            by_id = f"{classes.named([other])} by its id, as {ids_alone[0]!r} beside it is one"
            raise _ambiguous(entry, f"class {classes.named([label])} by its name", by_id, name)
    read_as = [other if label is None else label for _, label, other in pairs]
    chosen = [label for label in read_as if label is not None]
    if twice := sorted({label for label in chosen if chosen.count(label) > 1}):
        raise DataError(f"expected each class of {name} once, got {twice} again in {given!r}: check the labels.")
    return chosen


def _entries(given: Any, classes: Classes, name: str) -> list[str]:
    """The single names and ids, as text."""
    if isinstance(given, list | tuple):
        if odd := [entry for entry in given if isinstance(entry, bool) or not isinstance(entry, str | int)]:
            raise DataError(f"expected a list of class names or ids of {name}, got {odd[0]!r}: put it in quotes.")
        return [str(entry) for entry in given]
    if isinstance(given, bool) or not isinstance(given, str | int):
        raise DataError(f"expected comma-separated class ids or names of {name}, got {given!r}: put it in quotes.")
    try:
        parts = [part.strip() for part in next(csv.reader([str(given)], skipinitialspace=True)) or [""]]
    except csv.Error as error:
        raise DataError(f"expected comma-separated class ids or names of {name}, got {given!r}: {error}.") from error
    if len(parts) > 1 and given in classes.names.values():
        if set(parts) <= set(classes.names.values()):
            raise _ambiguous(str(given), "one class of that name", f"the classes {parts}", name)
        return [str(given)]
    return parts


def _called(entry: str, classes: Classes, name: str) -> int | None:
    """The class of that name, letter by letter, or however its accents are encoded."""
    for form in (str, _composed):
        found = [label for label, called in classes.names.items() if form(called) == form(entry)]
        if len(found) > 1:
            raise _ambiguous(entry, f"class {classes.named(found[:1])}", classes.named(found[1:]), name)
        if found:
            return found[0]
    return None


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _ambiguous(entry: str, first: str, second: str, name: str) -> DataError:
    return DataError(
        f"expected class names or class ids of {name} that can be read in one way, got {entry!r}: {first}, or {second}."
        " Write all classes as names, or all as ids; a list keeps names with commas apart."
    )


def _unknown(given: Any, unknown: list[str], classes: Classes, name: str) -> DataError:
    some = list(classes.names.values())
    hint = ""
    if any("," in each for each in some):
        hint = ": write a name that has a comma in double quotes, or give a list"
    return DataError(
        f"expected comma-separated class ids or names of {name} like '0,1,2' or "
        f"{','.join(some[:3])!r}, got {unknown} in {given!r}{hint}. It has {len(some)} classes: {', '.join(some[:20])}"
        f"{', …' if len(some) > 20 else ''}."
    )


def choose_rows(classes: Classes, labels: Sequence[int] | None, name: str) -> tuple[list[int], list[int], list[str]]:
    """Rows of the chosen classes in order, the new label 0..C-1 of each, and the classes' names.

    Args:
        classes: of the whole dataset.
        labels: ids in the order of their new labels; every class that has rows by default.
        name: of the dataset, for errors.

    Raises:
        DataError: fewer than two classes, or a class with no rows.
    """
    wanted = list(labels) if labels is not None else classes.present
    unlabelled = len(classes.ids) - len(classes.labelled(name))
    present = set(classes.present)
    if missing := [label for label in wanted if label not in present]:
        raise DataError(f"expected rows of every class in {name}, got none of {missing}: check labels and split.")
    if len(wanted) < 2:
        got = str([classes.names[label] for label in wanted])
        got += f" and {unlabelled} rows without a label" if unlabelled else ""
        raise DataError(f"expected at least two classes in {name}, got {got}: choose more labels.")
    renumber = {label: place for place, label in enumerate(wanted)}
    kept = [(row, renumber[label]) for row, label in enumerate(classes.ids) if label is not None and label in renumber]
    return [row for row, _ in kept], [place for _, place in kept], [classes.names[label] for label in wanted]


def select_classes(
    dataset: Any, labels: Sequence[int] | None, *, label_column: str, name: str
) -> tuple[Any, list[str]]:
    """Keep the given class ids, renumbered 0..C-1 in the given order; return the dataset and the class names.

    Rows without a label are left out, and counted in one line.

    Raises:
        DataError: a missing label column, labels that are none (``read_classes``), fewer than two classes, or a class
            with no rows.
    """
    if label_column not in dataset.column_names:
        raise DataError(
            f"expected column '{label_column}' in {name}, got {dataset.column_names}: set label_column."
        )
    rows, renumbered, names = choose_rows(read_classes(dataset, label_column, name), labels, name)
    return keep_rows(dataset, rows, renumbered, label_column), names


def keep_rows(dataset: Any, rows: Sequence[int], labels: Sequence[int], label_column: str) -> Any:
    """Some rows of a dataset with whole numbers as labels."""
    column = [0] * len(dataset)
    for row, label in zip(rows, labels, strict=True):
        column[row] = label
    return dataset.remove_columns(label_column).add_column(label_column, column).select(rows)
