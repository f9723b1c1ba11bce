"""Folders of image files: one sub-folder per class, or the same inside split folders; everything else is counted."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from transformers.utils import logging

from hf_immunize.data.classes import in_order
from hf_immunize.data.columns import label_candidates
from hf_immunize.data.tables import IMAGE, LABEL, TABLES, read_files, take_split
from hf_immunize.errors import DataError

logger = logging.get_logger(__name__)

Parts = tuple[str, ...]
"""A path below the folder, one string for each name."""

SYSTEM_NAMES = frozenset({
    "__macosx", "__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "$recycle.bin",
    "system volume information", "lost+found",
})  # fmt: skip
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_STUBS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
"""Formats that Pillow knows by name and cannot decode alone."""


@cache
def image_suffixes() -> frozenset[str]:
    """Lower-case suffixes of the image files that Pillow, with the plug-ins that are registered, can open."""
    from PIL import Image

    known = Image.registered_extensions()
    return frozenset(suffix for suffix, kind in known.items() if kind in Image.OPEN and kind not in _STUBS)


@dataclass
class Listing:
    """What lies in a folder: images, tables, metadata files, and how many of which other files."""

    root: Path
    images: list[Parts] = field(default_factory=list)
    tables: list[Parts] = field(default_factory=list)
    metadata: list[Parts] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    hidden: int = 0
    folders: set[str] = field(default_factory=set)
    """Names of the sub-folders that are not hidden, with or without images."""

    def below(self, top: str) -> Listing:
        """The same, of one sub-folder."""
        inner = Listing(self.root / top)
        inner.images, inner.tables, inner.metadata = (
            [parts[1:] for parts in held if parts[0] == top and len(parts) > 1]
            for held in (self.images, self.tables, self.metadata)
        )
        inner.folders = {parts[0] for parts in inner.images if len(parts) > 1}
        return inner


def list_folder(root: Path) -> Listing:
    """Every file of a folder and its sub-folders, links followed, in the order of their paths.

    Raises:
        DataError: a folder that cannot be read, a name that is not UTF-8, or a link to an image that is not there.
    """
    from datasets.data_files import FILES_TO_IGNORE

    found = Listing(root, folders={path.name for path in root.iterdir() if path.is_dir() and not _is_hidden(path.name)})
    for parts in sorted(_walk(root, (), (os.path.realpath(root),)), key="/".join):
        name, suffix = parts[-1], Path(parts[-1]).suffix.lower()
        if any(map(_is_hidden, parts)):
            found.hidden += 1
        elif name in METADATA:
            found.metadata.append(parts)
        elif suffix in image_suffixes():
            _check_file(root, parts)
            found.images.append(parts)
        elif suffix in TABLES and name not in FILES_TO_IGNORE:
            found.tables.append(parts)
        elif name != "README.md":
            found.others[suffix or "without a suffix"] += 1
    return found


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def _walk(folder: Path, parts: Parts, above: tuple[str, ...]) -> Iterator[Parts]:
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise DataError(f"expected a folder that can be read, got {folder}: {error.strerror}.") from error
    for entry in entries:
        if not entry.is_dir():
            yield (*parts, entry.name)
        elif (real := os.path.realpath(entry.path)) not in above:  # a link to a folder above would never end
            yield from _walk(Path(entry.path), (*parts, entry.name), (*above, real))


def _check_file(root: Path, parts: Parts) -> None:
    try:
        "/".join(parts).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"expected names in UTF-8 in {root}, got {'/'.join(parts)!r}: rename it.") from error
    if not root.joinpath(*parts).is_file():
        raise DataError(f"expected an image, got {'/'.join(parts)} in {root}, a link to nothing: repair or remove it.")


def split_of(name: str) -> str | None:
    """train, validation or test for a name that ``datasets`` takes for that split, in any case; else None."""
    from datasets.data_files import SPLIT_KEYWORDS

    return next((str(split) for split, words in SPLIT_KEYWORDS.items() if name.lower() in words), None)


def _like_split(name: str) -> str | None:
    """As ``split_of``, for a name with such a word in it (``images_train``)."""
    return next((found for word in re.split(r"[-._ 0-9]+", name) if (found := split_of(word))), None)


def split_folders(listing: Listing) -> dict[str, Listing] | None:
    """The split folders of ``train/<class>/…``, ``test/<class>/…``; None where the sub-folders are the classes.

    The structure decides: images that lie directly in a sub-folder make it a class, whatever it is called, unless a
    metadata file has their labels.

    Raises:
        DataError: sub-folders that can be read both ways.
    """
    tops = sorted({parts[0] for parts in listing.images if len(parts) > 1})
    inner = {top: listing.below(top) for top in tops}
    if len(tops) == 1 and not split_of(tops[0]) and len(inner[tops[0]].folders) > 0:
        deeper = inner[tops[0]]  # data/train/<class>: a folder around the split folders
        return split_folders(deeper) if all(map(split_of, deeper.folders)) and not _direct(deeper) else None
    words = [top for top in tops if split_of(top)]
    if words and words == tops and (_own_metadata(listing) or all(map(_own_metadata, inner.values()))):
        return inner
    nested = [top for top in words if not _direct(inner[top])]
    if nested and words == tops:
        if nested == words:
            return inner
        loose = sorted(set(words) - set(nested))
        raise _two_readings(listing, f"class folders in {nested}, and images directly in {loose}")
    alike = [top for top in tops if _like_split(top) and not _direct(inner[top])]
    common = set.intersection(*(inner[top].folders for top in alike)) if len(set(map(_like_split, alike))) > 1 else ()
    if len(common) > 1:
        raise _two_readings(listing, f"the same sub-folders {sorted(common)[:5]} in each of {alike}")
    return None


def _direct(listing: Listing) -> bool:
    return any(len(parts) == 1 for parts in listing.images)


def _own_metadata(listing: Listing) -> list[str]:
    return [parts[0] for parts in listing.metadata if len(parts) == 1]


def _two_readings(listing: Listing, got: str) -> DataError:
    return DataError(
        f"expected sub-folders of {listing.root} that are classes, or splits with a folder for each class, got both "
        f"readings: {got}. Name the folder that holds the class folders itself, or move the others elsewhere."
    )


def read_image_folder(listing: Listing, split: str) -> Any:
    """A lazy ``datasets.Dataset`` of paths with the class of each image; what is left out is counted in one line.

    Without class folders there is no label column. Labels of a metadata file with ``file_name`` go before folders.

    Raises:
        DataError: no image, a split that is not there, or sub-folders that can be read both ways.
    """
    parts, where = split_folders(listing), str(listing.root)
    if parts is None:
        parts, names = {"train": listing}, class_names(listing)
        if names and all(map(split_of, names)):
            logger.warning(f"{listing.root.name}: {', '.join(names)} hold images themselves: classes, not splits.")
            where += f" (its sub-folders {names} hold images themselves and are classes)"
    else:
        names = in_order({name for held in parts.values() for name in class_names(held)})
    used: list[Listing] = []

    def read(held: Listing) -> Any:
        used.append(held)
        return _read_rows(listing, held, names)

    makers = {name: lambda held=held: read(held) for name, held in parts.items()}
    dataset = take_split(makers, split, where, aliases=_aliases(parts))
    _tell_left_out(listing, used)
    return dataset


def _aliases(parts: Mapping[str, Listing]) -> dict[str, list[str]]:
    """The folders that stand for each of ``datasets``' split names."""
    found: dict[str, list[str]] = {}
    for name in parts:
        found.setdefault(split_of(name) or name, []).append(name)
    return found


def class_names(listing: Listing) -> list[str]:
    """The sub-folders with images, in the order of their ids: numbers by value, other names as text."""
    return in_order({parts[0] for parts in listing.images if len(parts) > 1})


def _read_rows(listing: Listing, held: Listing, names: list[str]) -> Any:
    """The rows of one split: the lines of a metadata file, else the images of the class folders."""
    from datasets import ClassLabel, Dataset, Features, Image

    if (rows := _read_metadata(held if _own_metadata(held) else listing, held)) is not None:
        return rows
    kept = [parts for parts in held.images if len(parts) > 1] or held.images
    images = [str(held.root.absolute().joinpath(*parts)) for parts in kept]
    if not names:
        return Dataset.from_dict({IMAGE: images}, features=Features({IMAGE: Image()}))
    places = {name: place for place, name in enumerate(names)}
    features = Features({IMAGE: Image(), LABEL: ClassLabel(names=names)})
    return Dataset.from_dict({IMAGE: images, LABEL: [places[parts[0]] for parts in kept]}, features=features)


def _read_metadata(owner: Listing, held: Listing) -> Any | None:
    """The lines of ``owner``'s metadata file about ``held``, where it has labels, or where there are no class folders.

    Raises:
        DataError: several metadata files, or a line about a file that is not there.
    """
    from datasets import Image

    if not (own := _own_metadata(owner)):
        return None
    if len(own) > 1:
        raise DataError(f"expected one metadata file in {owner.root}, got {own}: remove the others.")
    rows = read_files([owner.root / own[0]], "train")
    if IMAGE not in rows.column_names or not (label_candidates(rows) or not class_names(held)):
        logger.warning(f"{owner.root.name}: left out {own[0]}: no file_name in it, or class folders and no labels.")
        return None
    paths = [Path(stored["path"]) for stored in rows.cast_column(IMAGE, Image(decode=False))[IMAGE][:]]
    root = held.root.absolute()
    rows = rows.select([row for row, path in enumerate(paths) if path.is_relative_to(root)])
    if left := len({root.joinpath(*parts) for parts in held.images} - set(paths)):
        logger.warning(f"{held.root.name}: left out {left} images that {own[0]} does not name.")
    return rows


def _tell_left_out(listing: Listing, used: list[Listing]) -> None:
    """One line about the files of a folder that make no row."""
    depth = 1 if listing in used else 2  # a metadata file further down is nobody's
    tables = listing.tables + [parts for parts in listing.metadata if len(parts) > depth]
    counts = listing.others + Counter(Path(parts[-1]).suffix.lower() for parts in tables)
    told = [f"{count} {suffix}" for suffix, count in sorted(counts.items())]
    if listing.hidden:
        told.append(f"{listing.hidden} hidden or system files")
    if not _own_metadata(listing):
        places = {(held.root, *parts) for held in [listing, *used] for parts in held.images
                  if len(parts) == 1 and class_names(held) and not _own_metadata(held)}
        told += [f"{len(places)} images that lie in no class folder"] if places else []
    with_images = {parts[0] for parts in listing.images if len(parts) > 1}
    if empty := sorted(listing.folders - with_images):
        told.append(f"folders without an image: {', '.join(empty[:10])}")
    if told:
        logger.warning(f"{listing.root.name}: left out {', '.join(told)}; images are {_accepted()}.")


def _accepted() -> str:
    return "files like .png, .jpg, .webp, .bmp, .tif and .gif in class folders"


def describe_files(listing: Listing) -> str:
    """What a folder holds, in words, for errors."""
    counts = Counter(listing.others)
    for parts in (*listing.images, *listing.tables, *listing.metadata):
        counts[Path(parts[-1]).suffix.lower()] += 1
    told = [f"{count} {suffix}" for suffix, count in sorted(counts.items())]
    return ", ".join(told + ([f"{listing.hidden} hidden or system files"] if listing.hidden else [])) or "no files"
