"""Which output of a classifier a class of a data set is: by name, and by what the classifier itself says."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from math import comb
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from hf_immunize.data.pixels import PixelDataset
from hf_immunize.errors import DataError, ModelError

logger = logging.get_logger(__name__)

_GENERIC = re.compile(r"LABEL_\d+")
_NAMED = 10
_DOUBT = 1e-6
"""How unlikely it has to be that the labels are right before they are called wrong."""


def align_labels(names: Sequence[str], id2label: Mapping[int, str], where: str) -> list[int]:
    """For each class of a data set, the output of the model that has its name.

    Names are compared without regard to case, surrounding space, and whether words are joined by spaces, ``_`` or
    ``-``. Where one side has no names, numbers of a data set or ``LABEL_0``, … of a model, or not one name is on both
    sides (another language), classes keep their places; whether these are right, the model's answers show
    (``refuse_other_labels``).

    Args:
        names: of the data set's classes, in the order of its label ids.
        id2label: of the model's config (``id2label_of``).
        where: what the data set is called in messages.

    Raises:
        ModelError: names that the model does not have, or has twice; or other numbers of classes and no names to go by.
    """
    known = output_names(id2label)
    if list(names) == known:
        return list(range(len(names)))
    if not names_classes(id2label) or _are_numbers(names) and not _are_numbers(known):
        return _by_place(names, known, where)
    places: dict[str, list[int]] = {}
    for number, name in enumerate(known):
        places.setdefault(plain_name(name), []).append(number)
    if len(names) == len(known) and not any(plain_name(name) in places for name in names):
        pairs = ", ".join(f"{mine!r} is {theirs!r}" for mine, theirs in list(zip(names, known, strict=True))[:_NAMED])
        logger.warning(f"{where}: no class has the name of an output of the model, classes keep their order: {pairs}")
        return list(range(len(names)))
    missing = [name for name in names if plain_name(name) not in places]
    twice = [name for name in names if len(places.get(plain_name(name), ())) > 1]
    if missing or twice:
        told = f"none for {missing[:_NAMED]}" if missing else f"several for {twice[:_NAMED]}"
        spare = [name for name in known if plain_name(name) not in {plain_name(mine) for mine in names}]
        raise ModelError(
            f"expected one output of the model for each class of {where}, by name, got {told}; the model's other "
            f"classes are {spare[:_NAMED]}: rename the classes of one of them (id2label in the model's config.json), "
            "or choose the classes that the model knows with primary_labels."
        )
    return [places[plain_name(name)][0] for name in names]


def id2label_of(config: Any) -> dict[int, str]:
    """``id2label`` of a model's config; ``LABEL_0``, … where it says how many outputs there are and no more (PVT)."""
    held = getattr(config, "id2label", None)
    if held is not None:
        return dict(held)
    return {number: f"LABEL_{number}" for number in range(getattr(config, "num_labels", None) or 0)}


def output_names(id2label: Mapping[int, str]) -> list[str]:
    """Names of a model's outputs in their order."""
    outputs = {int(number): str(name) for number, name in id2label.items()}
    return [outputs.get(number, f"LABEL_{number}") for number in range(len(outputs))]


def names_classes(id2label: Mapping[int, str]) -> bool:
    """Whether a model's outputs have other names than ``LABEL_0``, ``LABEL_1``, …, which transformers makes up."""
    return not all(_GENERIC.fullmatch(name) for name in output_names(id2label))


def plain_name(name: str) -> str:
    """A class's name as it is compared: composed letters, no case, words with one space between."""
    return " ".join(re.split(r"[\s_-]+", unicodedata.normalize("NFC", name).strip().casefold()))


def _are_numbers(names: Sequence[str]) -> bool:
    return all(re.fullmatch(r"-?\d+", str(name)) for name in names)


def _by_place(names: Sequence[str], known: Sequence[str], where: str) -> list[int]:
    if len(names) != len(known):
        raise ModelError(
            f"expected a model with the {len(names)} classes of {where}, got {len(known)}: check primary_labels, set "
            "id2label in the model's config.json so that classes can be matched by name, or train a head for these "
            "classes first."
        )
    return list(range(len(names)))


def for_model(dataset: PixelDataset, id2label: Mapping[int, str]) -> PixelDataset:
    """The same rows with the model's label ids and names; told where that changes any.

    Raises:
        ModelError: as in ``align_labels``.
    """
    places, known = align_labels(dataset.label_names, id2label, dataset.name), output_names(id2label)
    if places == list(range(len(known))):
        return dataset
    pairs = [f"{name!r} is output {place}" for name, place in zip(dataset.label_names, places, strict=True)]
    more = ", …" if len(pairs) > _NAMED else ""
    logger.warning(f"{dataset.name}: classes are matched with the model's by name: {', '.join(pairs[:_NAMED])}{more}")
    return dataset.relabelled(torch.tensor(places)[dataset.labels], known)


def refuse_other_labels(predicted: Tensor, labels: Tensor, names: Sequence[str], where: str) -> None:
    """Raise DataError where a model tells the classes apart but calls them by other labels than the data set does.

    Half of the rows say which class each output stands for; on the other half, as many rows of every class, that
    reading is compared with the labels as they are by a sign test. A model that is untrained, good, or says one thing
    of everything, fares no better by it.

    Args:
        predicted, labels: N label ids each.
        names: of the label ids.

    Raises:
        DataError: the reading is right more often, beyond chance; the confusion is shown.
    """
    fit = torch.arange(len(labels)) % 2 == 0
    classes = max(len(names), int(predicted.max()) + 1)
    counts = torch.zeros(classes, classes, dtype=torch.float64)
    counts.index_put_((predicted[fit], labels[fit]), torch.ones(int(fit.sum()), dtype=torch.float64), accumulate=True)
    reading = _reading(counts / counts.sum(dim=0).clamp(min=1))
    judged = _balanced((~fit).nonzero().flatten(), labels)
    mine = predicted[judged] == labels[judged]
    other = reading[predicted[judged]] == labels[judged]
    better, worse = int((other & ~mine).sum()), int((mine & ~other).sum())
    if better <= worse or _sign_test(better, worse) >= _DOUBT:
        return
    moved = [place for place in range(classes) if int(reading[place]) != place and bool(counts[place].any())]
    told = "; ".join(
        f"output {place} ({names[place]!r}) is {names[int(reading[place])]!r} in "
        f"{int(counts[place, int(reading[place])])} of {int(counts[place].sum())} rows"
        for place in moved[:_NAMED]
    )
    right = int((predicted == labels).sum())
    raise DataError(
        f"expected the model's labels in {where}, got them in another order: {right} of {len(labels)} rows are "
        f"predicted as labelled; of {len(judged)} rows {int(other.sum())} are right when each output is read as the "
        f"class it stands for, and {int(mine.sum())} as it is. {told}. Give model and data the same class names "
        "(id2label in config.json), or order the classes of the data as the model does."
    )


def _reading(shares: Tensor) -> Tensor:
    """The class of each output: pairs taken by size, each output and each class once; the rest keep their places."""
    count = len(shares)
    reading = torch.full((count,), -1)
    free = torch.ones(count, dtype=torch.bool)
    for place in shares.flatten().argsort(descending=True, stable=True).tolist():
        output, label = divmod(place, count)
        if shares[output, label] <= 0:
            break
        if int(reading[output]) < 0 and bool(free[label]):
            reading[output], free[label] = label, False
    left = [output for output in range(count) if int(reading[output]) < 0]
    stay = [output for output in left if bool(free[output])]
    for output in stay:
        reading[output], free[output] = output, False
    for output, label in zip([o for o in left if o not in stay], free.nonzero().flatten().tolist(), strict=True):
        reading[output] = label
    return reading


def _balanced(rows: Tensor, labels: Tensor) -> Tensor:
    """The first rows of every class that is there, as many of each."""
    parts = [rows[labels[rows] == label] for label in labels[rows].unique()]
    least = min((len(part) for part in parts), default=0)
    return torch.cat([part[:least] for part in parts]) if parts else rows


def _sign_test(better: int, worse: int) -> float:
    """Chance of at least ``better`` heads of ``better + worse`` fair coins."""
    count = better + worse
    return sum(comb(count, heads) for heads in range(better, count + 1)) / 2**count
