"""Class-conditional tasks in pixel space: retained classes, a harmful concept and a benign one, from one source."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.utils import logging

from hf_immunize.data import (
    BACKGROUND,
    Classes,
    ImageFault,
    ImageTally,
    convert_image,
    describe_source,
    find_columns,
    load_source,
    parse_fractions,
    parse_labels,
    read_classes,
    read_image,
    split_by_content,
)
from hf_immunize.data.caching import cache_folder, places
from hf_immunize.data.fingerprint import digest_pixels
from hf_immunize.data.images import MODES
from hf_immunize.data.levels import to_levels
from hf_immunize.data.pixels import KEPT_BYTES
from hf_immunize.data.row_store import RowStore
from hf_immunize.diffusion.examples import LatentDataset
from hf_immunize.errors import DataError
from hf_immunize.options import option, required
from hf_immunize.records import DatasetFingerprint

logger = logging.get_logger(__name__)

_BLOCK = 1024
_NPZ_KEYS = (("x_train", "y_train"), ("images", "labels"))


@dataclass
class ConceptArguments:
    """Which classes a model keeps, and which it shall not learn. The same values belong in every stage."""

    dataset: str = required("Labelled images: an .npz file with x_train and y_train (or images and labels), or what a "
                            "classifier's tasks take (Hub id, image folder, parquet file, builder:digits). Several, "
                            "separated by commas: labels go on from one to the next, so that class 0 of a second "
                            "source of 10 classes is 10.")
    other_dataset: str | None = option(None, "Images of the same classes from another source, which one of the "
                                       "attackers trains on.")
    retain_labels: str = option("0,1,2,3,4,5,6,7", "Classes to keep, by name or id.")
    harmful_labels: str = option("9", "The concept it shall not learn.")
    benign_labels: str = option("8", "A concept it should learn as easily as the base.")
    image_size: int = option(28, "Height and width in pixels.")
    channels: int = option(1, "1 for grey images, 3 for colour.")
    rows_per_class: int | None = option(None, "First rows of each class to use; all by default.")
    image_column: str = option("image", "Column of images. A dataset without one of this name is read by its only "
                               "image column.")
    label_column: str = option("label", "Column of labels. A dataset without one of this name is read by its only one "
                               "of classes.")
    retain_splits: str = option("train=0.8,validation=0.1,test=0.1", "Content-hash splits of the retained classes.")
    concept_splits: str = option("defense=0.35,attack=0.35,validation=0.1,test=0.2", "Content-hash splits of a "
                                 "concept: defense is all that the immunizer may see.")
    split_seed: int = option(0, "Seed of the content-hash splits.")


class ArrayImages:
    """Images and labels in memory, with as much of a ``datasets.Dataset`` as ``split_by_content`` asks for."""

    column_names = ("image", "label")

    def __init__(self, images: np.ndarray, labels: np.ndarray, names: Mapping[int, str] | None = None):
        self.images, self.labels = images, labels
        self.names = {label: str(label) for label in sorted(set(labels.tolist()))} if names is None else dict(names)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"image": Image.fromarray(self.images[row])}

    def select(self, rows: Sequence[int] | np.ndarray) -> ArrayImages:
        """Some rows."""
        return ArrayImages(self.images[rows], self.labels[rows], self.names)


def read_images(arguments: ConceptArguments) -> ArrayImages:
    """All images as uint8 N×H×W (or N×H×W×3) of the asked size. Raises DataError for what cannot be read."""
    if arguments.channels not in MODES:
        raise DataError(f"expected channels of 1 (grey) or 3 (colour), got {arguments.channels}.")
    images, labels, first = [], [], 0
    names: dict[int, str] = {}
    for source in sources(arguments):
        read = _read_npz if source.endswith(".npz") else _read_dataset
        found = read(source, arguments)
        _check_shape(found.images, source, arguments)
        images.append(found.images)
        labels.append(found.labels + first)
        names |= {label + first: str(label + first) if called == str(label) else called
                  for label, called in found.names.items()}
        first = max(names) + 1
    return ArrayImages(np.concatenate(images), np.concatenate(labels), names)


def sources(arguments: ConceptArguments) -> list[str]:
    """The names in ``dataset``. Raises DataError for none."""
    found = [name for part in arguments.dataset.split(",") if (name := part.strip())]
    if not found:
        raise DataError(f"expected the name of a dataset, got {arguments.dataset!r}: set dataset.")
    return found


def _check_shape(images: np.ndarray, source: str, arguments: ConceptArguments) -> None:
    mode, size = MODES[arguments.channels], (arguments.image_size, arguments.image_size)
    if images.shape[1:3] != size or (images.ndim == 4) != (mode == "RGB"):
        raise DataError(
            f"expected images of size {size} in mode {mode}, got {images.shape[1:]} in {Path(source).name}: set "
            "image_size and channels."
        )


def _read_npz(source: str, arguments: ConceptArguments) -> ArrayImages:
    path = Path(source)
    try:
        with np.load(path, allow_pickle=False) as held:
            for image_key, label_key in _NPZ_KEYS:
                if image_key in held and label_key in held:
                    return ArrayImages(*_checked(held[image_key], held[label_key], path.name, arguments))
            found = sorted(held.keys())
    except DataError:
        raise
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"expected a readable .npz file, got {path.name}: {error}.") from error
    raise DataError(f"expected x_train and y_train, or images and labels, in {path.name}, got {found}.")


def _checked(
    images: np.ndarray, labels: np.ndarray, name: str, arguments: ConceptArguments
) -> tuple[np.ndarray, np.ndarray]:
    """Images as uint8 with channels last and labels as int64. Raises DataError for values that cannot be levels."""
    if len(images) == 0 or len(images) != len(labels):
        raise DataError(f"expected one label for each image in {name}, got {len(images)} images, {len(labels)} labels.")
    tally = ImageTally(images=len(images))
    try:
        levels = to_levels(images, tally, whole_dataset=True)
    except ImageFault as fault:
        raise DataError(f"expected pixels in 0..255 in {name}, got {fault.told}.") from fault
    if images.dtype != bool and int(levels.max()) == 1:
        raise DataError(
            f"expected pixels in 0..255 in {name}, got no other levels than 0 and 1, which are both black: multiply "
            "them by 255, or save them as bool."
        )
    tally.deep *= len(images)  # one range, of them all
    whole = labels.astype(np.int64)
    if not np.array_equal(labels, whole):
        raise DataError(
            f"expected whole numbers as labels in {name}, got {labels.dtype} in {labels.min()}..{labels.max()}: "
            "convert them."
        )
    made = _channels_last(levels, name, arguments, tally)
    tally.tell(name, BACKGROUND)
    return made, whole


def _channels_last(levels: np.ndarray, name: str, arguments: ConceptArguments, tally: ImageTally) -> np.ndarray:
    """N×H×W or N×H×W×3 from the usual layouts of N images; those with alpha are put on the background."""
    size = (arguments.image_size, arguments.image_size)
    if levels.ndim == 4 and levels.shape[1:3] != size and levels.shape[2:] == size:
        levels = np.moveaxis(levels, 1, -1)
    if levels.ndim == 4 and levels.shape[-1] == 1:
        return levels[..., 0]
    if levels.ndim == 4 and levels.shape[-1] in (2, 4):
        tally.images = 0
        mode = "RGB" if levels.shape[-1] == 4 else "L"
        return np.stack([np.asarray(convert_image(Image.fromarray(image), mode, tally=tally)) for image in levels])
    return levels


def _read_dataset(source: str, arguments: ConceptArguments) -> ArrayImages:
    held, tally = load_source(source), ImageTally()
    name = f"the dataset {describe_source(source)}"
    image, label = find_columns(held, None, None, side="", shared=(arguments.image_column, arguments.label_column))
    classes = read_classes(held, label, name)
    rows = classes.labelled(name)
    if not len(rows):
        raise DataError(f"expected rows with a label in {name}, got none of {len(held)}: check label_column.")
    size, mode = (arguments.image_size, arguments.image_size), MODES[arguments.channels]
    images = [np.asarray(read_image(held, row, image, name, mode=mode, tally=tally).resize(size)) for row in rows]
    tally.tell(name, BACKGROUND)
    return ArrayImages(np.stack(images), np.asarray([classes.ids[row] for row in rows]), classes.names)


class ConceptTask:
    """The three groups of classes, split by content and turned into examples on demand."""

    def __init__(self, arguments: ConceptArguments):
        self._arguments = arguments
        self.source = ",".join(map(describe_source, sources(arguments)))
        if arguments.rows_per_class is not None and arguments.rows_per_class < 1:
            raise DataError(f"expected rows_per_class of at least 1, got {arguments.rows_per_class}.")
        everything = read_images(arguments)
        self.label_names = [str(label) for label in range(int(everything.labels.max()) + 1)]
        classes = Classes(everything.labels.tolist(), everything.names)
        self._splits: dict[str, dict[str, ArrayImages]] = {}
        self._other = None
        if arguments.other_dataset is not None:
            self._other = read_images(replace(arguments, dataset=arguments.other_dataset))
        chosen: list[int] = []
        told: list[str] = []
        for side in ("retain", "harmful", "benign"):
            labels = parse_labels(getattr(arguments, f"{side}_labels"), classes, "the dataset") or []
            told.append(f"{side}: {classes.named([label for label in labels if label in classes.names])}")
            if repeated := set(labels) & set(chosen):
                raise DataError(f"expected each class on one side, got {sorted(repeated)} twice: check the labels.")
            chosen += labels
            rows = _rows_of(everything.labels, labels, arguments.rows_per_class, side)
            splits = arguments.retain_splits if side == "retain" else arguments.concept_splits
            self._splits[side] = split_by_content(
                everything.select(rows), parse_fractions(splits), seed=arguments.split_seed,
                name=f"the {side} classes", labels=everything.labels[rows].tolist(),
            )

        if any(called != str(label) for label, called in everything.names.items()):
            logger.warning(f"{self.source}: chosen classes, by id and name: {'; '.join(told)}.")

    sides = ("retain", "harmful", "benign")
    judge_names: Mapping[str, str] = {}
    """A judge calls the classes as they are."""

    def examples(self, side: str, split: str) -> LatentDataset:
        """Pixels in −1..1 with the class label as condition. Raises DataError for a split that is not there."""
        if split not in self._splits.get(side, {}):
            raise DataError(f"expected a split of {side} in {sorted(self._splits.get(side, {}))}, got {split!r}.")
        return self._rows(self._splits[side][split], f"{side} {split}")

    def fingerprint(self, side: str, split: str) -> DatasetFingerprint:
        """Identity by content of the rows of one split."""
        return self.examples(side, split).fingerprint(source=self.source, role=f"{side} {split}")

    def described(self, *_: str) -> dict[str, Any]:
        """The arguments, each source by its own name; of all sides, as a class is kept unless another has it."""
        other = self._arguments.other_dataset
        named = {"dataset": self.source, "other_dataset": other and ",".join(map(describe_source, other.split(",")))}
        return asdict(self._arguments) | named

    def _rows(self, held: ArrayImages, name: str) -> LatentDataset:
        labels = torch.from_numpy(held.labels.astype(np.int64))
        if held.images.size * 4 <= KEPT_BYTES:
            return LatentDataset(_scaled(held.images), {"class_labels": labels}, labels, self.label_names, name)
        key = hashlib.sha256(digest_pixels(held.images) + digest_pixels(held.labels)).hexdigest()[:32]
        parts = places(len(held), _BLOCK)
        batches = ((_scaled(held.images[part.start : part.stop]), labels[part.start : part.stop]) for part in parts)
        store = RowStore.open_or_write(cache_folder("pixels") / key, batches, len(held))
        return LatentDataset.stored(store, ["class_labels"], labels, self.label_names, name)

    def attacker_knows(self, concept: str) -> dict[str, Any]:
        """What an attacker holds beside images of the concept, as DiffusionAttackContext takes it.

        Another name is the class that the attack is not about (harmful for benign, and the other way round), a generic
        one the first retained class. A model that is told numbers has no placeholders. Images of another source, where
        there are any, are those of the concept's classes.
        """
        names = {"other": self.examples("benign" if concept == "harmful" else "harmful", "attack"),
                 "generic": self.examples("retain", "validation")}
        known: dict[str, Any] = {
            key: {name: value[held.labels == held.labels.min()][:1] for name, value in held.conditions.items()}
            for key, held in names.items()
        }
        known["prior"] = self.examples("retain", "validation")
        if self._other is not None:
            labels = self.examples(concept, "attack").labels.unique().tolist()
            rows = _rows_of(self._other.labels, labels, None, f"{concept} (other_dataset)")
            known["other_images"] = self._rows(self._other.select(rows), f"other {concept}")
        return known


def _scaled(images: np.ndarray) -> Tensor:
    """Levels N×H×W or N×H×W×3 as N×C×H×W in −1..1."""
    pixels = torch.from_numpy(images.astype(np.float32)) / 127.5 - 1
    return pixels.unsqueeze(1) if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2).contiguous()


def _rows_of(labels: np.ndarray, wanted: Sequence[int], limit: int | None, side: str) -> np.ndarray:
    parts = [np.flatnonzero(labels == label)[:limit] for label in wanted]
    if empty := [label for label, rows in zip(wanted, parts, strict=True) if len(rows) == 0]:
        raise DataError(f"expected images of every {side} class, got none of {empty}: check {side}_labels.")
    return np.concatenate(parts)

