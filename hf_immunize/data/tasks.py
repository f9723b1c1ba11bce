"""A task as its user names it: source, classes and splits, turned into checked pixel datasets."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from hf_immunize.data.fingerprint import fingerprint
from hf_immunize.data.pixels import PixelDataset, collate_pixels, preprocess
from hf_immunize.data.sources import describe_source, load_source
from hf_immunize.data.splits import (
    BENIGN_SPLITS,
    HARMFUL_SPLITS,
    PRIMARY_SPLITS,
    parse_fractions,
    select_classes,
    split_by_content,
)
from hf_immunize.errors import DataError
from hf_immunize.records import DatasetFingerprint


def _fractions(splits: dict[str, float]) -> str:
    return ",".join(f"{name}={fraction}" for name, fraction in splits.items())


@dataclass
class TaskArguments:
    """Where the two tasks come from and how they are split. The same values belong in every stage of one exam."""

    primary_dataset: str = field(
        metadata={"help": "Primary task: Hub id, image folder, parquet file, builder:NAME or builder:module:function."}
    )
    harmful_dataset: str = field(metadata={"help": "Harmful task: the same kinds of source."})
    primary_config: str | None = field(default=None, metadata={"help": "Configuration name of the primary dataset."})
    harmful_config: str | None = field(default=None, metadata={"help": "Configuration name of the harmful dataset."})
    primary_split: str = field(default="train", metadata={"help": "Split of the primary dataset to load."})
    harmful_split: str = field(default="train", metadata={"help": "Split of the harmful dataset to load."})
    primary_labels: str | None = field(
        default=None, metadata={"help": "Comma-separated class ids of the primary task; all classes by default."}
    )
    harmful_labels: str | None = field(
        default=None, metadata={"help": "Comma-separated class ids of the harmful task; all classes by default."}
    )
    image_column: str = field(default="image", metadata={"help": "Column that holds the images."})
    label_column: str = field(default="label", metadata={"help": "Column that holds integer labels."})
    primary_splits: str = field(
        default=_fractions(PRIMARY_SPLITS),
        metadata={"help": "Content-hash splits of the primary task; names train, validation and test are expected."},
    )
    harmful_splits: str = field(
        default=_fractions(HARMFUL_SPLITS),
        metadata={
            "help": "Content-hash splits of the harmful task: defense is all the immunizer may see; attack, validation "
            "and test belong to the attacker."
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
        default=None, metadata={"help": "Comma-separated class ids of the benign task; all classes by default."}
    )
    benign_splits: str = field(
        default=_fractions(BENIGN_SPLITS),
        metadata={"help": "Content-hash splits of the benign task; names attack, validation and test are expected."},
    )
    split_seed: int = field(default=0, metadata={"help": "Seed of the content-hash splits."})


class Task:
    """One side (``primary``, ``harmful`` or ``benign``) of TaskArguments, loaded and split, preprocessed on demand."""

    def __init__(self, arguments: TaskArguments, side: str):
        self.side = side
        if getattr(arguments, f"{side}_dataset") is None:
            raise DataError(f"expected a {side} task, got none: set {side}_dataset.")
        self.source: str = getattr(arguments, f"{side}_dataset")
        self._arguments = arguments
        dataset = load_source(
            self.source, config=getattr(arguments, f"{side}_config"), split=getattr(arguments, f"{side}_split")
        )
        labels = getattr(arguments, f"{side}_labels")
        dataset, self.label_names = select_classes(
            dataset, _label_ids(labels), label_column=arguments.label_column, name=f"the {side} dataset"
        )
        self._splits = split_by_content(
            dataset,
            parse_fractions(getattr(arguments, f"{side}_splits")),
            image_column=arguments.image_column,
            seed=arguments.split_seed,
            name=f"the {side} dataset",
        )

    def pixels(self, role: str, processor: Any) -> PixelDataset:
        """Preprocessed pixels of one split. Raises DataError for a split the task does not have."""
        if role not in self._splits:
            raise DataError(f"expected a split of the {self.side} task in {sorted(self._splits)}, got {role!r}.")
        return preprocess(
            self._splits[role],
            processor,
            label_names=self.label_names,
            name=f"{self.side} {role}",
            image_column=self._arguments.image_column,
            label_column=self._arguments.label_column,
        )

    def fingerprint(self, dataset: PixelDataset, role: str) -> DatasetFingerprint:
        """Content fingerprint of a split made by ``pixels``."""
        return fingerprint(dataset, source=describe_source(self.source), role=f"{self.side} {role}")


def _label_ids(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in str(text).split(",")]
    except ValueError as error:
        raise DataError(f"expected comma-separated class ids like '0,1,2', got {text!r}.") from error


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
            yield {"pixel_values": dataset.pixel_values[rows], "labels": dataset.labels[rows]}
    else:
        yield from DataLoader(dataset, batch_size=batch_size, collate_fn=collate_pixels)
