"""Shards of webdataset: tar files in which files of one name and several suffixes are one sample."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hf_immunize.data.columns import label_candidates
from hf_immunize.data.folders import image_suffixes
from hf_immunize.data.tables import LABEL, split_in_name, take_split
from hf_immunize.errors import DataError

SHARD = ".tar"
_TEXTS = frozenset({"cls", "cls2", "id", "index", "inx", "json", "jsn", "txt", "text"})
_KEY, _JSON = "__key__", ("json", "jsn")


def read_shards(files: Sequence[Path], split: str, where: str) -> Any:
    """One split of shards, by the split words in their names (``train-000.tar``), else all as ``train``.

    Images stay encoded. Labels are those of ``.cls``, of a field ``label`` (or called as usual) of ``.json``, else the
    folders that samples lie in.

    Raises:
        DataError: a file that is no tar file, one without samples, files in it that are neither images nor text, or a
            split that is not there.
    """
    for file in files:
        _check(file)
    found: dict[str | None, list[Path]] = {}
    for file in files:
        found.setdefault(split_in_name(file.stem), []).append(file)
    left = found.pop(None, [])
    parts = {name: held for name, held in found.items() if name}
    if left:
        parts["train"] = [*parts.get("train", []), *left]
    return take_split({name: partial(_read, held) for name, held in parts.items()}, split, where)


def _check(file: Path) -> None:
    """Raise DataError for what datasets would stumble over, or would unpickle."""
    try:
        with tarfile.open(file) as archive:
            files = [member.name for member in archive if member.isfile()]
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"expected a tar file of samples, got {file}: {error}: download it again.") from error
    names = [name for name in files if not Path(name).name.startswith(".")]
    if not names:
        raise DataError(f"expected samples in {file}, got an archive without files: check the path.")
    known = {suffix.removeprefix(".") for suffix in image_suffixes()} | _TEXTS
    for name in names:
        suffix = Path(name).name.lower().rpartition(".")[2]
        if suffix not in known:
            raise DataError(
                f"expected images, .cls, .json and .txt in {file}, got {name!r}: shards with other files are not read. "
                "Write it again without them."
            )


def _read(files: Sequence[Path]) -> Any:
    from datasets import load_dataset

    rows = load_dataset("webdataset", data_files={"train": [str(file.absolute()) for file in files]}, split="train")
    told = [name for name in _JSON if name in rows.column_names and hasattr(rows.features[name], "items")]
    if told and not label_candidates(rows):
        before = set(rows.column_names)
        rows = rows.flatten()
        short = {name: name.partition(".")[2] for name in rows.column_names if name.partition(".")[0] in told}
        rows = rows.rename_columns({name: other for name, other in short.items() if other not in before})
    if label_candidates(rows):
        return rows
    folders = [str(key).rpartition("/")[0] for key in rows[_KEY][:]]
    return rows.add_column(LABEL, folders) if all(folders) and len(set(folders)) > 1 else rows
