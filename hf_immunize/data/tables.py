"""Tables on this machine: files, snapshots of Hub datasets, folders of ``save_to_disk``; the asked split alone."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers.utils import logging

from hf_immunize.errors import DataError

logger = logging.get_logger(__name__)

IMAGE, LABEL = "image", "label"
TABLES = {
    ".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json",
    ".ndjson": "json",
}  # fmt: skip
FILE_NAME = "file_name"


def take_split(
    parts: Mapping[str, Callable[[], Any]], split: str, where: str, aliases: Mapping[str, Sequence[str]] | None = None
) -> Any:
    """The rows of ``split``, in the words of ``datasets`` (``train``, ``train[:100]``, ``train+test``).

    Args:
        parts: what makes each split's ``datasets.Dataset``; only those that are asked for are made.
        split: the split.
        where: the source, for errors.
        aliases: other names of splits, and which parts each may mean.

    Raises:
        DataError: a split that is not there (those that are there are named), or a name that means two.
    """
    from datasets import ReadInstruction, concatenate_datasets

    aliases = aliases or {}
    made: dict[str, Any] = {}
    for name in split_names(split):
        held = [name] if name in parts else list(aliases.get(name, ()))
        if len(held) > 1:
            raise DataError(f"expected one folder of split {name!r} in {where}, got {held}: ask for one by its name.")
        if not held:
            raise missing_split(name, list(parts), where)
        made[name] = parts[held[0]]()
    if split in made:
        return made[split]
    try:
        wanted = ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in made.items()})
    except (AssertionError, ValueError) as error:
        raise DataError(f"expected a split like train or train[:100] of {where}, got {split!r}: {error}.") from error
    return concatenate_datasets([made[part.splitname].select(range(part.from_, part.to)) for part in wanted])


def split_names(split: str) -> list[str]:
    """The splits that an instruction like ``train[:100]+test`` names."""
    return [part.split("[")[0].split("(")[0].strip() for part in split.split("+")]


def missing_split(name: str, there: Sequence[str], where: str) -> DataError:
    """The error for a split that a source does not have."""
    return DataError(f"expected a split that is in {where}, got {name!r}: there is {', '.join(there)}. Set the split.")


def read_files(files: Sequence[Path], split: str, folder: Path | None = None) -> Any:
    """The rows of files of one kind as one split: ``train``, or for one file also that which its name tells.

    Args:
        files: tables.
        split: the asked one.
        folder: where paths of images in them start; the folder of the first by default.

    Raises:
        DataError: another split than theirs, or an image that is not there.
    """
    from datasets import load_dataset

    kind, suffix = TABLES[files[0].suffix.lower()], files[0].suffix.lower()
    own = split_in_name(files[0].stem) if len(files) == 1 else None
    asked = split_names(split)
    if wrong := next((name for name in asked if name not in ("train", own)), None):
        raise missing_split(wrong, [own or "train"], str(files[0]))
    options: dict[str, Any] = {"sep": "\t"} if suffix == ".tsv" else {}
    if kind == "csv":  # a class may be called None, NA or null; nothing at all is no label
        options |= {"keep_default_na": False, "na_values": [""]}
    name = asked[0]
    rows = load_dataset(kind, data_files={name: [str(file.absolute()) for file in files]}, split=split, **options)
    return with_images(rows, (folder or files[0].parent).absolute())


def split_in_name(name: str) -> str | None:
    """The split that a word in a file's name stands for."""
    from datasets.data_files import SPLIT_KEYWORDS

    words = re.split(r"[-._ 0-9]+", name)
    return next((str(split) for split, known in SPLIT_KEYWORDS.items() if set(known) & set(words)), None)


def read_tables(folder: Path, tables: Sequence[Path], split: str) -> Any:
    """One split of tables that lie beside their images, by the split words in the tables' names, else all as ``train``.

    Raises:
        DataError: tables of several kinds, or a split that is not there.
    """
    kinds = sorted({TABLES[table.suffix.lower()] for table in tables})
    if len(kinds) > 1:
        names = [table.name for table in tables[:5]]
        raise DataError(f"expected tables of one kind in {folder}, got {names}: name the one that is meant.")
    found: dict[str | None, list[Path]] = {}
    for table in tables:
        words = [table.stem, *table.relative_to(folder).parts[:-1]]
        found.setdefault(next((name for word in words if (name := split_in_name(word))), None), []).append(table)
    left = found.pop(None, [])
    parts = {name: files for name, files in found.items() if name} or {"train": left}
    if found:
        _tell_unused(folder, left)
    return take_split({name: partial(read_files, files, "train", folder) for name, files in parts.items()},
                      split, str(folder))


def _tell_unused(folder: Path, tables: Sequence[Path]) -> None:
    if tables:
        names = ", ".join(sorted(table.name for table in tables)[:5])
        logger.warning(f"{folder.name}: left out {len(tables)} files that belong to no split of it, such as {names}.")


def read_snapshot(folder: Path, config: str | None, split: str, tables: Sequence[Path]) -> Any:
    """One split of a folder of data files, found as ``datasets.load_dataset`` finds it in a Hub repository.

    That is by the configurations in README.md, else by the names of the files (``data/train-00000-of-00001.parquet``).

    Raises:
        DataError: a split or a configuration that is not there.
    """
    from datasets import load_dataset, load_dataset_builder

    builder = load_dataset_builder(str(folder.absolute()), config)
    found = dict(builder.config.data_files or {})
    for name in split_names(split):
        if name not in found:
            raise missing_split(name, [str(there) for there in found], str(folder))
    named = {Path(str(file)).resolve() for files in found.values() for file in files}
    _tell_unused(folder, [table for table in tables if table.resolve() not in named])
    rows = load_dataset(str(folder.absolute()), config, split=split, cache_dir=_cache_of(folder, named))
    return with_images(rows, folder.absolute())


def _cache_of(folder: Path, files: Iterable[Path]) -> str | None:
    """Where rows of these files are kept: where ``datasets`` keeps them, in a folder of their own where README.md names
    the files, since its cache then goes by the README alone and would give the rows of files that have changed."""
    from datasets.config import HF_DATASETS_CACHE

    if not has_configurations(folder):
        return None
    there = [(str(file), file.stat()) for file in sorted(files) if file.is_file()]
    told = repr([(name, found.st_size, found.st_mtime_ns) for name, found in there])
    return str(Path(HF_DATASETS_CACHE) / f"files-{hashlib.sha256(told.encode()).hexdigest()[:16]}")


def has_configurations(folder: Path) -> bool:
    """Whether the YAML block of a folder's README.md says which data files make which split.

    Raises:
        DataError: a README.md whose YAML block cannot be read.
    """
    from datasets.config import REPOYAML_FILENAME
    from huggingface_hub.repocard import metadata_load

    card = folder / "README.md"
    try:
        if (folder / REPOYAML_FILENAME).is_file():
            return True
        return card.is_file() and bool((metadata_load(card) or {}).get("configs"))
    except Exception as error:  # YAML and the card's own checks raise unrelated classes
        raise DataError(f"expected a README.md with a readable YAML block in {folder}, got {error}.") from error


def is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` wrote the folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def read_saved(folder: Path, split: str) -> Any:
    """One split of what ``save_to_disk`` wrote. Raises DataError for a split that is not there."""
    from datasets import load_from_disk

    return choose_split(load_from_disk(str(folder)), split, str(folder))


def choose_split(held: Any, split: str, where: str) -> Any:
    """One split of a Dataset or DatasetDict in memory. A Dataset is one split, ``train`` or what it is called.

    Raises:
        DataError: a split that is not there, or something else than these two.
    """
    from datasets import Dataset, DatasetDict

    if isinstance(held, DatasetDict):
        return take_split({name: partial(held.__getitem__, name) for name in held}, split, where)
    if not isinstance(held, Dataset):
        raise DataError(f"expected a datasets.Dataset or DatasetDict from {where}, got {type(held).__name__}.")
    own = split_names(str(held.split)) if held.split is not None else []
    return take_split({name: lambda: held for name in ("train", *own[:1])}, split, where)


def with_images(rows: Any, folder: Path) -> Any:
    """The rows with encoded images, and paths of images below ``folder``, as ``datasets.Image`` columns.

    Raises:
        DataError: a path that names no file; its row is named.
    """
    from datasets import Image

    for column, feature in dict(rows.features).items():
        kind = getattr(feature, "dtype", None)
        if isinstance(feature, Mapping) and set(feature) == {"bytes", "path"}:
            rows = rows.cast_column(column, Image())
        elif kind in ("binary", "large_binary") and _is_encoded(_first(rows, column)):
            rows = rows.cast_column(column, Image())
        elif kind in ("string", "large_string") and _is_image_path(folder, _first(rows, column)):
            rows = _with_paths(rows, column, folder)
    if FILE_NAME in rows.column_names and IMAGE not in rows.column_names:
        rows = rows.rename_column(FILE_NAME, IMAGE)
    return rows


def _first(rows: Any, column: str) -> Any:
    return next((value for row in range(min(len(rows), 100)) if (value := rows[column][row]) is not None), None)


def _is_encoded(value: bytes | None) -> bool:
    from PIL import Image, UnidentifiedImageError

    try:
        Image.open(io.BytesIO(value or b"")).close()
    except (OSError, UnidentifiedImageError):
        return False
    return True


def _is_image_path(folder: Path, value: str | None) -> bool:
    from PIL import Image

    suffix = Path(value).suffix.lower() if value else ""
    return suffix in Image.registered_extensions() and (folder / str(value)).is_file()


def _with_paths(rows: Any, column: str, folder: Path) -> Any:
    from datasets import Image

    values = rows[column][:]
    missing = [row for row, value in enumerate(values) if value is None or not (folder / value).is_file()]
    if missing:
        raise DataError(
            f"expected an image file for every row in column '{column}', got {values[missing[0]]!r} in row {missing[0]}"
            f" ({len(missing)} such rows), which is not in {folder}: repair the table."
        )
    paths = [str(folder / value) for value in values]
    return rows.remove_columns(column).add_column(column, paths).cast_column(column, Image())
