"""Any image dataset by one name: a Hub id, a folder of images, local tables, or an in-memory builder."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_immunize.data.builders import BUILDERS
from hf_immunize.data.columns import image_candidates
from hf_immunize.data.folders import (
    Listing,
    class_names,
    describe_files,
    image_suffixes,
    list_folder,
    read_image_folder,
    split_folders,
)
from hf_immunize.data.shards import SHARD, read_shards
from hf_immunize.data.tables import (
    TABLES,
    choose_split,
    has_configurations,
    is_saved,
    read_files,
    read_saved,
    read_snapshot,
    read_tables,
)
from hf_immunize.errors import DataError

ACCEPTED = (
    "a Hub id, an image folder, a .parquet, .arrow, .csv, .tsv, .json, .jsonl or .ndjson file, a .tar of webdataset, a "
    "folder of them or of save_to_disk, or builder:NAME"
)


def load_source(source: str, *, config: str | None = None, split: str = "train", revision: str | None = None) -> Any:
    """Load one split as a ``datasets.Dataset``; images stay encoded until a row is read.

    Args:
        source: ``builder:NAME`` (a key of BUILDERS) or ``builder:module:function`` returning a Dataset or DatasetDict;
            a folder with one sub-folder of images per class, or split folders of such; a table (``tables.TABLES``), a
            folder of tables or a snapshot of a Hub dataset, a folder of ``save_to_disk``; else a Hub id.
        config, split: as in ``datasets.load_dataset``.
        revision: branch, tag or commit of a dataset on the Hub.

    Raises:
        DataError: a source that cannot be found or read, a split that is not there (those that are there are named), or
            an option that this kind of source does not have.
    """
    if source.startswith("builder:"):
        _refuse(source, "a builder", config=config, revision=revision)
        return choose_split(_build(source.removeprefix("builder:")), split, source)
    path = Path(source).expanduser()
    if path.exists():
        _refuse(source, "a local source", revision=revision)
    elif _is_path(source):
        raise DataError(f"expected {ACCEPTED}, got {source!r}: there is no such file or folder. Check the path.")
    try:
        if path.is_file():
            return _read_file(path, config, split)
        if path.is_dir():
            return _read_folder(path, config, split)
        return _load_from_hub(source, config, split, revision)
    except DataError:
        raise
    except Exception as error:  # datasets raises many unrelated classes for "cannot be found or read"
        which = "" if path.exists() else "there is no such folder here, and the Hub gave no such dataset: "
        raise DataError(
            f"expected {ACCEPTED}, got {source!r} (split {split!r}): {which}{type(error).__name__}: {error}"
        ) from error


def _is_path(source: str) -> bool:
    """Whether a source that is not there was plainly meant as a path: a Hub id is NAME or OWNER/NAME."""
    known = {*TABLES, *image_suffixes(), ".zip", ".tar", ".gz", ".npz", ".txt"}
    return not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source) or Path(source).suffix.lower() in known


def _refuse(source: str, kind: str, **options: str | None) -> None:
    if given := [f"{name} {value!r}" for name, value in options.items() if value is not None]:
        raise DataError(f"expected no {' and no '.join(given)} with {kind}, got {source!r}: it has none. Unset it.")


def _read_file(path: Path, config: str | None, split: str) -> Any:
    _refuse(str(path), "a single file", config=config)
    if path.suffix.lower() == SHARD:
        return read_shards([path], split, str(path))
    if path.suffix.lower() not in TABLES:
        raise DataError(f"expected {ACCEPTED}, got the file {path.name!r}: convert or unpack it.")
    return read_files([path], split)


def _read_folder(path: Path, config: str | None, split: str) -> Any:
    """Rows of a folder by what lies in it: its own record of a dataset, class folders of images, or tables."""
    if is_saved(path):
        _refuse(str(path), "a folder of save_to_disk", config=config)
        return read_saved(path, split)
    listing = list_folder(path)
    files = [path.joinpath(*parts) for parts in (*listing.tables, *listing.metadata)]
    if config is not None or has_configurations(path):
        return read_snapshot(path, config, split, files)
    if listing.images and (not listing.tables or _holds_classes(listing)):
        return read_image_folder(listing, split)
    if listing.tables:
        return _read_tables(listing, files, split)
    if listing.others.get(SHARD):
        return read_shards(sorted(path.rglob(f"*{SHARD}")), split, str(path))
    raise DataError(f"expected {ACCEPTED}, got the folder {path} with {describe_files(listing)}: check the path.")


def _holds_classes(listing: Listing) -> bool:
    """Whether images lie in class folders; DataError where a table of whole datasets lies beside them."""
    if split_folders(listing) is None and len(class_names(listing)) < 2:
        return False
    whole = [parts[-1] for parts in listing.tables if Path(parts[-1]).suffix.lower() in (".parquet", ".arrow")]
    if whole:
        raise DataError(
            f"expected class folders or tables in {listing.root}, got both: images in {class_names(listing)[:5]} and "
            f"{whole[:5]}. Name the table itself, or move one of the two."
        )
    return True


def _read_tables(listing: Listing, files: list[Path], split: str) -> Any:
    """The tables of a folder; its images where the tables are not about images."""
    if not listing.images:
        return read_snapshot(listing.root, None, split, files)
    try:
        rows = read_tables(listing.root, [listing.root.joinpath(*parts) for parts in listing.tables], split)
    except DataError:
        raise
    except Exception:  # a file that only looks like a table: it is counted with what is left out
        return read_image_folder(listing, split)
    return rows if image_candidates(rows) else read_image_folder(listing, split)


def _load_from_hub(source: str, config: str | None, split: str, revision: str | None) -> Any:
    from datasets import load_dataset

    return load_dataset(source, config, split=split, revision=revision)


_COMMIT = re.compile(r"hf://datasets/[^@]+@([0-9a-f]{40})/")


def commit_of(dataset: Any) -> str | None:
    """The commit of the Hub dataset that these rows were read from, where its files tell of one, else None."""
    urls = getattr(getattr(dataset, "info", None), "download_checksums", None) or {}
    found = {match[1] for url in urls if (match := _COMMIT.match(str(url)))}
    return found.pop() if len(found) == 1 else None


def _build(name: str) -> Any:
    if name in BUILDERS:
        return BUILDERS[name]()
    module, _, function = name.partition(":")
    if not function:
        raise DataError(f"expected builder:NAME, NAME in {sorted(BUILDERS)}, or builder:module:function, got {name!r}.")
    with _working_directory_importable():
        try:
            build = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise DataError(f"expected an importable function for builder:{name}, got {error}.") from error
        return build()


@contextmanager
def _working_directory_importable() -> Iterator[None]:
    """A module of the user's lies where he stands; ``python -m`` looks there, a console script does not."""
    here = os.getcwd()
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)


def describe_source(source: str) -> str:
    """A name for records and cards that gives away no local path: the last path component of a local source."""
    if source.startswith("builder:"):
        return source
    path = Path(source).expanduser()
    return Path(os.path.abspath(path)).name if path.exists() else source
