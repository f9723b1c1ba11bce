"""A task as its user names it: source, classes and splits, turned into checked pixel datasets."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers.utils import logging

from hf_immunize.data.class_splits import rare_classes
from hf_immunize.data.classes import choose_rows, keep_rows, parse_labels, read_classes
from hf_immunize.data.columns import find_columns, read_groups
from hf_immunize.data.copies import warn_of_copies
from hf_immunize.data.fingerprint import fingerprint
from hf_immunize.data.images import BACKGROUND
from hf_immunize.data.near_duplicates import Looks, group_contents, read_looks
from hf_immunize.data.pixels import PixelDataset, collate_pixels, preprocess
from hf_immunize.data.sources import commit_of, describe_source, load_source
from hf_immunize.data.splits import BENIGN_SPLITS, HARMFUL_SPLITS, PRIMARY_SPLITS, assign_splits, parse_fractions
from hf_immunize.errors import DataError
from hf_immunize.records import DatasetFingerprint

logger = logging.get_logger(__name__)


def _fractions(splits: dict[str, float]) -> str:
    return ",".join(f"{name}={fraction}" for name, fraction in splits.items())


SIDES = ("primary", "harmful", "benign")
"""Of a task of classes; the options of each begin with its name."""


@dataclass
class TaskArguments:
    """Where the two tasks come from and how they are split. The same values belong in every stage of one exam."""

    primary_dataset: str = field(
        metadata={
            "help": "Primary task: Hub id, image folder, table (parquet, csv, jsonl, …) or folder of tables, "
            "builder:NAME or builder:module:function; see docs/data.md."
        }
    )
    harmful_dataset: str = field(metadata={"help": "Harmful task: the same kinds of source."})
    primary_config: str | None = field(default=None, metadata={"help": "Configuration name of the primary dataset."})
    harmful_config: str | None = field(default=None, metadata={"help": "Configuration name of the harmful dataset."})
    primary_split: str = field(default="train", metadata={"help": "Split of the primary dataset to load."})
    harmful_split: str = field(default="train", metadata={"help": "Split of the harmful dataset to load."})
    primary_labels: str | None = field(
        default=None,
        metadata={"help": "Class names or ids of the primary task, with commas between, or a list; all by default."},
    )
    harmful_labels: str | None = field(
        default=None,
        metadata={"help": "Class names or ids of the harmful task, with commas between, or a list; all by default."},
    )
    image_column: str = field(
        default="image",
        metadata={"help": "Column of images. A dataset without one of this name is read by its only image column."},
    )
    label_column: str = field(
        default="label",
        metadata={"help": "Column of labels. A dataset without one of this name is read by its only one of classes."},
    )
    primary_splits: str = field(
        default=_fractions(PRIMARY_SPLITS),
        metadata={"help": "Content-hash splits of the primary task; names train, validation and test are expected."},
    )
    harmful_splits: str = field(
        default=_fractions(HARMFUL_SPLITS),
        metadata={
            "help": "Content-hash splits of the harmful task: defense is all the immunizer may see; attack, validation "
            "and test belong to the attacker. Rows of a split named probe are the defender's too, but not trained on: "
            "they show while training what a probe still reaches (probe_steps)."
        },
    )
    benign_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Third task, harmless and new to the model: the same kinds of source. It shows whether the model "
            "can still be fine-tuned, and is what attackers mix with harmful data."
        },
    )
    benign_config: str | None = field(default=None, metadata={"help": "Configuration name of the benign dataset."})
    benign_split: str = field(default="train", metadata={"help": "Split of the benign dataset to load."})
    benign_labels: str | None = field(
        default=None,
        metadata={"help": "Class names or ids of the benign task, with commas between, or a list; all by default."},
    )
    benign_splits: str = field(
        default=_fractions(BENIGN_SPLITS),
        metadata={"help": "Content-hash splits of the benign task; names attack, validation and test are expected."},
    )
    split_seed: int = field(default=0, metadata={"help": "Seed of the content-hash splits."})
    primary_image_column: str | None = field(default=None, metadata={"help": "image_column of the primary dataset."})
    primary_label_column: str | None = field(default=None, metadata={"help": "label_column of the primary dataset."})
    primary_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a primary dataset on the Hub."}
    )
    harmful_image_column: str | None = field(default=None, metadata={"help": "image_column of the harmful dataset."})
    harmful_label_column: str | None = field(default=None, metadata={"help": "label_column of the harmful dataset."})
    harmful_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a harmful dataset on the Hub."}
    )
    benign_image_column: str | None = field(default=None, metadata={"help": "image_column of the benign dataset."})
    benign_label_column: str | None = field(default=None, metadata={"help": "label_column of the benign dataset."})
    benign_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a benign dataset on the Hub."}
    )
    drop_rare_classes: bool = field(
        default=False,
        metadata={"help": "Leave out classes with fewer different images than splits, where they would be an error."},
    )
    group_near_duplicates: bool = field(
        default=False,
        metadata={"help": "Keep images that look alike (resized, encoded again, mirrored) in one split."},
    )

    group_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of what images belong to (patient, video, original of copies): rows that have its value in "
            "common stay in one split."
        },
    )
    primary_group_column: str | None = field(default=None, metadata={"help": "group_column of the primary dataset."})
    harmful_group_column: str | None = field(default=None, metadata={"help": "group_column of the harmful dataset."})
    benign_group_column: str | None = field(default=None, metadata={"help": "group_column of the benign dataset."})

    preprocessing_workers: int = field(
        default=0,
        metadata={"help": "Processes that decode images where a whole dataset is read once, to split it by content."},
    )
    background: str = field(
        default=BACKGROUND, metadata={"help": "Colour that transparent parts of images show: a name or #rrggbb."}
    )

    def described(self) -> dict[str, Any]:
        """The options that decide the rows; those that are off, and new since the first release, are left out."""
        own = ("image_column", "label_column", "group_column", "revision")
        later = [f"{side}_{name}" for side in SIDES for name in own]
        later += ["drop_rare_classes", "group_near_duplicates", "group_column"]
        told = {name: value for name, value in asdict(self).items() if name not in later or value}
        told.pop("preprocessing_workers")
        return told if self.background != BACKGROUND else {n: v for n, v in told.items() if n != "background"}


class Task:
    """One side (``primary``, ``harmful`` or ``benign``) of TaskArguments, loaded and split, preprocessed on demand.

    Images of two splits that look alike are told in a warning (``near_duplicates``).
    """

    def __init__(self, arguments: TaskArguments, side: str):
        self.side, self._background = side, arguments.background
        if getattr(arguments, f"{side}_dataset") is None:
            raise DataError(f"expected a {side} task, got none: set {side}_dataset.")
        self.source: str = getattr(arguments, f"{side}_dataset")
        name = f"the {side} dataset"
        own = {
            option: getattr(arguments, f"{side}_{option}")
            for option in (
                "config", "split", "revision", "labels", "splits", "image_column", "label_column", "group_column",
            )
        }
        dataset = load_source(self.source, config=own["config"], split=own["split"], revision=own["revision"])
        self.commit = commit_of(dataset)
        """Of a dataset on the Hub: which state of it was read, whatever branch was asked for."""
        self._columns: tuple[str, str] = find_columns(
            dataset, own["image_column"], own["label_column"], side=side,
            shared=(arguments.image_column, arguments.label_column),
        )
        classes = read_classes(dataset, self._columns[1], name)
        chosen = parse_labels(own["labels"], classes, name)
        rows, labels, names = choose_rows(classes, chosen, name)
        if chosen is not None:
            logger.warning(f"{name}: chosen classes, by id and name: {classes.named(chosen)}.")
        looks = read_looks(dataset, rows, self._columns[0], name, workers=arguments.preprocessing_workers)
        groups = read_groups(dataset, rows, own["group_column"] or arguments.group_column, side)
        alike = arguments.group_near_duplicates
        keys = group_contents(looks, groups, alike=alike) if groups or alike else looks.contents
        fractions = parse_fractions(own["splits"])
        if arguments.drop_rare_classes:
            kept, labels, names = _without_rare(keys, labels, names, len(fractions), name)
            rows, keys, looks = [rows[place] for place in kept], [keys[place] for place in kept], looks.select(kept)
        self.label_names: list[str] = names
        places = assign_splits(keys, labels, fractions, seed=arguments.split_seed, name=name, label_names=names)
        held = keep_rows(dataset, rows, labels, self._columns[1])
        self._splits = {split: held.select(found) for split, found in places.items()}
        self._looks = {
            split: (looks.select(found), [rows[place] for place in found]) for split, found in places.items()
        }
        warn_of_copies(self)

    @property
    def split_names(self) -> list[str]:
        """Names of the splits."""
        return list(self._splits)

    def pixels(self, role: str, processor: Any) -> PixelDataset:
        """Preprocessed pixels of one split. Raises DataError for a split the task does not have."""
        if role not in self._splits:
            raise DataError(f"expected a split of the {self.side} task in {sorted(self._splits)}, got {role!r}.")
        return preprocess(
            self._splits[role],
            processor,
            label_names=self.label_names,
            name=f"{self.side} {role}",
            image_column=self._columns[0],
            label_column=self._columns[1],
            background=self._background,
        )

    def contents(self) -> set[tuple[bytes, str]]:
        """Digest of the pixels and class of each image, of all splits."""
        column = self._columns[1]
        return {
            (content, self.label_names[label]) for split, (looks, _) in self._looks.items()
            for content, label in zip(looks.contents, self._splits[split][column], strict=True)
        }

    def looks(self) -> dict[str, tuple[Looks, list[int]]]:
        """What each split's images look like, and their rows in the source."""
        return self._looks

    def fingerprint(self, dataset: PixelDataset, role: str) -> DatasetFingerprint:
        """Content fingerprint of a split made by ``pixels``."""
        return fingerprint(dataset, source=describe_source(self.source), role=f"{self.side} {role}")


def _without_rare(
    keys: Sequence[bytes], labels: Sequence[int], names: Sequence[str], splits: int, name: str
) -> tuple[list[int], list[int], list[str]]:
    """Places, labels and names without the classes of fewer different images than splits, which are told."""
    rare = rare_classes(keys, labels, splits)
    if rare:
        told = ", ".join(f"{names[label]!r} ({count})" for label, count in rare.items())
        logger.warning(
            f"{name}: drop_rare_classes left out {len(rare)} of {len(names)} classes, which have fewer different images"
            f" than the {splits} splits: {told}."
        )
    left = [label for label in range(len(names)) if label not in rare]
    if len(left) < 2:
        raise DataError(
            f"expected at least two classes of {splits} different images or more in {name}, got "
            f"{[names[label] for label in left]}: bring more images."
        )
    renumber = {label: place for place, label in enumerate(left)}
    kept = [place for place, label in enumerate(labels) if label in renumber]
    return kept, [renumber[labels[place]] for place in kept], [names[label] for label in left]


def forward_rows(image: Sequence[int], device: str | torch.device = "cpu") -> int:
    """How many images of this C×H×W shape to send through a network at once where no gradient is asked for.

    On a CPU a batch whose activations leave the cache costs about twice as much per image (MobileNetV2 at 128 pixels:
    12 ms at 16 rows, 23 ms at 256; benchmarks/forward_batches.py), so it is about a million numbers of input.
    """
    if torch.device(device).type != "cpu":
        return 256
    return max(4, min(512, 2**20 // math.prod(image)))


def batches(
    dataset: PixelDataset, batch_size: int | None = None, device: str | torch.device = "cpu"
) -> Iterator[dict[str, Tensor]]:
    """The dataset once, in order, as stacked batches: of ``forward_rows`` images for ``device`` by default."""
    if batch_size is None:
        batch_size = forward_rows(dataset[0]["pixel_values"].shape, device) if len(dataset) else 1
    if isinstance(dataset, PixelDataset):
        for rows in torch.arange(len(dataset)).split(batch_size):
            yield {"pixel_values": dataset.stacked(rows), "labels": dataset.labels[rows]}
    else:
        yield from DataLoader(dataset, batch_size=batch_size, collate_fn=collate_pixels)
