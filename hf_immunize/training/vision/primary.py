"""The primary task's own loss by kind of head: wrong labels, distillation, and the metric that guards it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hf_immunize.data import (
    Labels,
    NamedRows,
    NamedStream,
    as_mapping,
    check_label_range,
    find_labels,
    first_row,
    is_stream,
    label_key,
    labels_of,
    read_labels,
    whole_number,
)
from hf_immunize.errors import DataError
from hf_immunize.features import under_adapters

SINGLE, MULTI, REGRESSION, UNLABELLED = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
    "unlabelled",
)


def kind_of(model: Any, first: Mapping[str, Any]) -> str:
    """What the primary head is trained on: the config's problem_type, or no labels at all, else single labels.

    Args:
        first: the first primary row.
    """
    if len(first) and label_key(first) is None and "ForImageClassification" not in type(under_adapters(model)).__name__:
        return UNLABELLED
    return getattr(model.config, "problem_type", None) or SINGLE


def refuse_other_problem(model: Any, first: Mapping[str, Any], name: str = "train_dataset") -> None:
    """Raise DataError for labels that are no class, of a head that is said to tell classes apart (or of which nothing
    is said): transformers guesses what it trains from the first batch, and a guard has to know before.

    Args:
        first: the first primary row.
    """
    key, outputs = label_key(first), model.config.num_labels
    try:
        label = torch.as_tensor(first[key]) if key is not None else torch.tensor(0)
    except (TypeError, ValueError, RuntimeError):
        return  # the check of labels says what it is
    said = getattr(model.config, "problem_type", None)
    if label.numel() > 1:
        raise DataError(
            f"expected one class in each row of {name} for problem_type={said!r}, got {label.numel()} numbers in row "
            f"0: set model.config.problem_type='{MULTI}' for labels of 0 and 1, or '{REGRESSION}' for numbers."
        )
    if outputs == 1:
        raise DataError(
            f"expected a head of at least two outputs for problem_type={said!r}, got one, with the label "
            f"{label.tolist()} in row 0 of {name}: set model.config.problem_type='{REGRESSION}' for numbers, or load "
            "the model with num_labels of its classes."
        )


def check_primary_labels(model: Any, primary: Any, kind: str, name: str = "train_dataset") -> list[int] | Tensor:
    """The labels of every primary row, checked against the head before training; rows are read if they have to be.

    Raises:
        DataError: a row whose label the head cannot be trained on; the row is named.
    """
    if kind == UNLABELLED:
        return torch.zeros(len(primary), dtype=torch.long)
    if kind == SINGLE:
        labels = labels_of(primary, name)
        check_label_range(labels, model.config.num_labels, name)
        return labels
    found = find_labels(primary, name)
    values = read_labels(primary, _key_of(found, name), name) if found.values is None else found.values
    check = RowCheck(model, kind)
    return torch.stack([check.label(value, row, name) for row, value in enumerate(values)])


def check_known_labels(model: Any, primary: Any, kind: str, name: str) -> tuple[Mapping[str, Any], ...]:
    """As ``check_primary_labels``, of the labels that are known without reading rows, and of a few rows else: those.

    The others are checked as they are read (``RowCheck``).

    Raises:
        DataError: a row whose label the head cannot be trained on; the row is named.
    """
    if kind == UNLABELLED:
        return ()
    check = RowCheck(model, kind)
    if is_stream(primary):
        check(first_row(primary, name), 0, name)
        return ()
    found = find_labels(primary, name)
    _key_of(found, name)
    values = found.sampled if found.values is None else found.values
    if kind == SINGLE:
        if isinstance(values, Tensor):
            values = values.tolist()
        whole = [whole_number(value, row, name) for row, value in enumerate(values)]
        check_label_range(whole, model.config.num_labels, name)
        return found.rows
    for row, value in enumerate(values):
        check.label(value, row, name)
    return found.rows


def _key_of(found: Labels, name: str) -> str:
    if found.key is None:
        raise DataError(f"expected a 'labels' column in {name}, got none: rename the label column to 'labels'.")
    return found.key


def named(rows: Any, name: str, check: RowCheck, *, repeat: bool) -> Any:
    """Rows or a stream that name themselves and the row in what they raise; a stream that repeats begins again."""
    return NamedStream(rows, name, repeat=repeat, check=check) if is_stream(rows) else NamedRows(rows, name, check)


class RowCheck:
    """Called with each row that is read: raises DataError where the head cannot be trained on its label."""

    def __init__(self, model: Any, kind: str):
        self._kind, self._outputs = kind, int(model.config.num_labels) if kind != UNLABELLED else 0

    def __call__(self, row: Any, number: int, name: str) -> None:
        """Check one row of ``name``."""
        if self._kind == UNLABELLED:
            return
        key = label_key(as_mapping(row, number, name))
        if key is not None:  # else the collator says what is missing
            self.label(row[key], number, name)

    def label(self, value: Any, row: int, name: str) -> Tensor:
        """One label as a tensor, checked."""
        if self._kind == SINGLE:
            whole = whole_number(value, row, name)
            if not 0 <= whole < self._outputs:
                check_label_range([0] * row + [whole], self._outputs, name)
            return torch.tensor(whole)
        label = torch.as_tensor(value).float()
        wanted = (self._outputs,) if self._kind == MULTI or self._outputs > 1 else ()
        if tuple(label.shape) != wanted:
            raise DataError(
                f"expected labels of shape {wanted} in {name} for a {self._kind} head with "
                f"{self._outputs} outputs, got {tuple(label.shape)} in row {row}: fix the label column or "
                "the model's num_labels."
            )
        if not bool(torch.isfinite(label).all()):
            raise DataError(f"expected finite labels in {name}, got {label.tolist()} in row {row}: remove it.")
        return label


def wrong_labels(labels: Tensor, kind: str, classes: int) -> Tensor:
    """Labels that are all wrong: the next class, every bit flipped, or another row's target."""
    if kind == SINGLE:
        return labels.roll(1, dims=-1) if labels.is_floating_point() else (labels + 1) % classes  # mixed ones are soft
    return 1 - labels if kind == MULTI else labels.roll(1, dims=0)


def divergence(outputs: Tensor, target: Tensor, kind: str, temperature: float = 1.0) -> Tensor:
    """How far outputs are from θ₀'s: KL(softmax ‖ softmax) per row, KL of independent bits, or mean squared error.

    Both are divided by ``temperature`` first, and nothing is multiplied back: see ``temperature_of``.
    """
    outputs, target = outputs / temperature, target / temperature
    if kind == REGRESSION:
        return functional.mse_loss(outputs, target)
    if kind == MULTI:
        cross = functional.binary_cross_entropy_with_logits(outputs, target.sigmoid(), reduction="sum")
        own = functional.binary_cross_entropy_with_logits(target, target.sigmoid(), reduction="sum")
        return (cross - own) / len(outputs)
    return functional.kl_div(
        outputs.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="batchmean"
    )
