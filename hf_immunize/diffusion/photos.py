"""Folders of image files as pixels, with the captions that lie in or beside them.

Images are made RGB or grey as everywhere (``hf_immunize.data.images``); the shorter side is resized, the middle
cropped. Nothing is augmented.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
import torch
from PIL import ImageOps
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import logging

from hf_immunize.data.caching import cache_folder, identity_of_files, is_shared, places
from hf_immunize.data.fingerprint import as_digests, as_rows, digest_pixels
from hf_immunize.data.images import BACKGROUND, MODES, decode_image
from hf_immunize.data.levels import ImageFault, ImageTally
from hf_immunize.data.row_store import RowStore
from hf_immunize.errors import DataError

logger = logging.get_logger(__name__)

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_SYSTEM = ("thumbs.db", "ehthumbs.db", "desktop.ini")
CAPTIONS, CAPTIONS_CSV, SIDECAR = "metadata.jsonl", "metadata.csv", ".txt"
_EXAMPLE = '{"file_name": "a.png", "text": "a photo"}'


def _files_in(folder: str | Path) -> list[Path]:
    return sorted(path for path in Path(folder).glob("*") if path.is_file() and not _is_hidden(path))


def _is_hidden(path: Path) -> bool:
    """Files of the system's own: ``._a.png``, ``.DS_Store``, ``Thumbs.db``."""
    return path.name.startswith(".") or path.name.lower() in _SYSTEM


def _images_in(folder: str | Path) -> list[Path]:
    return [path for path in _files_in(folder) if path.suffix.lower() in _SUFFIXES]


def has_images(folder: str | Path) -> bool:
    """Whether image files lie directly in a folder."""
    return bool(_images_in(folder))


def image_files(folder: str | Path) -> list[Path]:
    """Image files of a folder, by name. Raises DataError for none."""
    names = _images_in(folder)
    if not names:
        others = _not_read(folder)
        got = f"none, but {_counted(others)}: convert them" if others else "none: check the path"
        raise DataError(f"expected images ({', '.join(_SUFFIXES)}) in {Path(folder).name!r}, got {got}.")
    return names


def _not_read(folder: str | Path) -> list[Path]:
    """Files that are neither images that are read, nor captions, nor the system's own."""
    files = _files_in(folder)
    stems = {_plain(path.stem) for path in files if path.suffix.lower() in _SUFFIXES}
    return [
        path for path in files
        if path.suffix.lower() not in _SUFFIXES and path.name not in (CAPTIONS, CAPTIONS_CSV)
        and not (path.suffix.lower() == SIDECAR and _plain(path.stem) in stems)
    ]


def _counted(files: list[Path]) -> str:
    kinds = Counter(path.suffix.lower() or "(no suffix)" for path in files)
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))


def _tell_left_out(folder: Path) -> None:
    others = _not_read(folder)
    hidden = sum(path.is_file() and _is_hidden(path) for path in folder.glob("*"))
    note = f"{hidden} hidden or system files in {folder.name!r} are left out"
    if others:
        logger.warning(
            f"{len(others)} files in {folder.name!r} are not read ({_counted(others)}), e.g. {others[0].name!r}: "
            f"images are {', '.join(_SUFFIXES)}, captions name.txt beside an image.{f' {note}.' if hidden else ''}"
        )
    elif hidden:
        logger.info(f"{note}.")


def read_captions(folder: str | Path) -> list[str] | None:
    """A caption for each image of a folder, in the order of their names; None where there are none at all.

    They are the ``text`` that ``metadata.jsonl`` or ``metadata.csv`` gives each ``file_name``, in the folder, or above
    it with ``folder/name`` as file names; or the whole text of ``name.txt`` beside ``name.png``. One of these, for
    every image.

    Raises:
        DataError: captions in two places, an image without one, a table that cannot be read, or captions in another
            kind of file.
    """
    folder = Path(folder)
    files, notes = image_files(folder), _notes_beside(folder)
    path, start = _table_of(folder)
    told = {} if path is None else {
        name.removeprefix(start): text for name, text in _captions_of(path).items() if name.startswith(start)
    }
    if path is not None and told and notes:
        raise DataError(
            f"expected the captions of {folder.name} in one place, got both {path.name} and {len(notes)} {SIDECAR} "
            f"files ({next(iter(notes))}{SIDECAR}): remove one of them."
        )
    if notes:
        return _of_every(files, {file.name: notes.get(_plain(file.stem), "") for file in files},
                         f"{folder.name}, as {SIDECAR} beside each")
    if path is None:
        return None
    captions = _of_every(files, {file.name: told.get(_plain(file.name), "") for file in files},
                         f"{folder.name}/{path.name}")
    if unknown := sorted(set(told) - {_plain(file.name) for file in files}):
        logger.warning(f"{len(unknown)} captions in {path.name} are of no image in {folder.name!r}: {unknown[:5]}.")
    return captions


def _of_every(files: list[Path], captions: dict[str, str], where: str) -> list[str]:
    missing = [file.name for file in files if not captions[file.name].strip()]
    if missing:
        raise DataError(
            f"expected a caption of every image in {where}, got none for {missing[:5]}"
            f"{f' and {len(missing) - 5} more' if len(missing) > 5 else ''}: add one."
        )
    return [captions[file.name] for file in files]


def _plain(name: str) -> str:
    """Names as they look: an accent may be a character of its own in a file system and not in a table."""
    return normalize("NFC", name)


def _notes_beside(folder: Path) -> dict[str, str]:
    """Text of each ``name.txt`` that lies beside an image, by name without suffix."""
    stems = {_plain(file.stem) for file in _images_in(folder)}
    notes: dict[str, str] = {}
    for file in _files_in(folder):
        stem = _plain(file.stem)
        if file.suffix.lower() != SIDECAR or stem not in stems:
            continue
        if stem in notes:
            raise DataError(f"expected one caption for {stem!r} in {folder.name}, got several {SIDECAR} files.")
        notes[stem] = _text_of(file).strip()
    return notes


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"expected {path.parent.name}/{path.name} in UTF-8, got {error}.") from error


def _table_of(folder: Path) -> tuple[Path | None, str]:
    """The file of captions in a folder, or above it, and what its file names start with."""
    above = not has_images(folder.parent)
    for place, start in ((folder, ""), *(((folder.parent, f"{_plain(folder.name)}/"),) if above else ())):
        found = [path for name in (CAPTIONS, CAPTIONS_CSV) if (path := place / name).is_file()]
        if len(found) > 1:
            raise DataError(f"expected one file of captions in {place.name}, got {CAPTIONS} and {CAPTIONS_CSV}.")
        if found:
            return found[0], start
        if not start and (place / "metadata.parquet").is_file():
            raise DataError(f"expected captions in {CAPTIONS}, got metadata.parquet in {folder.name}: convert it.")
    return None, ""


def _captions_of(path: Path) -> dict[str, str]:
    told: dict[str, str] = {}
    where = f"{path.parent.name}/{path.name}"
    for number, line, read in _rows_of(path, where):
        try:
            row = read()
            name, text = row["file_name"], row["text"]
            if not isinstance(name, str) or not isinstance(text, str):
                raise TypeError("file_name and text must be strings")
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"expected lines like {_EXAMPLE if path.name == CAPTIONS else 'file_name,text'} in {where}, got "
                f"{line[:60]!r} in line {number}: {type(error).__name__} {error}."
            ) from error
        if told.setdefault(_plain(name), text) != text:
            raise DataError(f"expected one caption for {name!r} in {where}, got another in line {number}.")
    return told


def _rows_of(path: Path, where: str) -> Iterator[tuple[int, str, Any]]:
    """Number, text and reader of every line."""
    text = _text_of(path)
    if path.name == CAPTIONS:
        for number, line in enumerate(text.split("\n"), 1):  # splitlines would split inside captions as well
            if line.strip():
                yield number, line, lambda line=line: json.loads(line)
        return
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for row in reader:
            yield reader.line_num, str(list(row.values())), lambda row=row: row
    except csv.Error as error:
        raise DataError(f"expected a table with the columns file_name and text in {where}, got {error}.") from error


class Photos:
    """Image files of folders as N×C×R×R in −1..1, by name, decoded when they are asked for and not kept.

    Args:
        files: in order.
        resolution, channels: R, and C: 3 for colour or 1 for grey.
        background: what transparent parts show.

    Raises:
        DataError: other channels.
    """

    def __init__(
        self, files: Sequence[Path], resolution: int, *, channels: int = 3,
        background: str | tuple[int, int, int] = BACKGROUND,
    ):  # fmt: skip
        if channels not in MODES:
            where = repr(files[0].parent.name) if files else "a folder"
            raise DataError(f"expected 1 or 3 channels for the images of {where}, got channels={channels}.")
        self.files, self.resolution, self.channels = list(files), resolution, channels
        self._background = background

    def __len__(self) -> int:
        return len(self.files)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """N, C, R and R."""
        return len(self.files), self.channels, self.resolution, self.resolution

    def subset(self, rows: Sequence[int]) -> Photos:
        """Some of the images, in that order."""
        files = [self.files[row] for row in rows]
        return Photos(files, self.resolution, channels=self.channels, background=self._background)

    def stacked(self, rows: Sequence[int] | None = None, tally: ImageTally | None = None) -> Tensor:
        """Pixels of some images, of all by default. Raises DataError for one that cannot be read."""
        files = self.files if rows is None else [self.files[row] for row in rows]
        return torch.stack([self._decoded(path, tally) for path in files])

    def split(self, rows: int) -> Iterator[Tensor]:
        """Pixels of all images in order, ``rows`` at a time."""
        for part in places(len(self), rows):
            yield self.stacked(part)

    def _decoded(self, path: Path, tally: ImageTally | None) -> Tensor:
        size, channels = self.resolution, self.channels
        try:
            image = decode_image(path, MODES[channels], background=self._background, tally=tally)
        except ImageFault as fault:
            raise DataError(f"expected a readable image, got {path.name!r}: {fault.told}.") from fault
        levels = np.asarray(ImageOps.fit(image, (size, size))).astype(np.float32).reshape(size, size, channels)
        return torch.from_numpy(levels / 127.5 - 1).permute(2, 0, 1)

    def digests(self, name: str) -> list[bytes]:
        """``digest_pixels`` of every image, from one pass with a progress bar, which is kept where there are many.

        Raises:
            DataError: an image that cannot be read, or 16-bit images that are all but black.
        """
        if not is_shared(len(self)):
            return [digest for part in self._hashed(name) for digest in part]
        words = (self.resolution, self.channels, self._background)
        folder = cache_folder("digests") / identity_of_files(self.files, *words)
        batches = ((as_rows(part),) for part in self._hashed(name))
        return as_digests(RowStore.open_or_write(folder, batches, len(self)).column(0))

    def _hashed(self, name: str) -> Iterator[list[bytes]]:
        tally = ImageTally()
        with tqdm(total=len(self), desc=f"images of {name}", unit="row", leave=False, disable=None) as bar:
            for rows in places(len(self), 16):
                yield [digest_pixels(pixels.numpy()) for pixels in self.stacked(rows, tally)]
                bar.update(len(rows))
        tally.tell(f"{name!r}", self._background)


def read_photos(folder: str | Path, resolution: int, *, channels: int = 3) -> Photos:
    """The images of a folder; files that are none are told. Raises DataError for no images, or other channels."""
    found = Photos(image_files(folder), resolution, channels=channels)
    _tell_left_out(Path(folder))
    return found


def read_pixels(
    folder: str | Path, resolution: int, *, channels: int = 3, background: str | tuple[int, int, int] = BACKGROUND
) -> Tensor:
    """Every image of a folder as N×C×R×R in −1..1, by name, C = 3 for colour or 1 for grey.

    Raises:
        DataError: no images, one that cannot be read, 16-bit images that are all but black, or other channels.
    """
    if channels not in MODES:
        raise DataError(f"expected 1 or 3 channels for the images of {Path(folder).name!r}, got channels={channels}.")
    tally, folder = ImageTally(), Path(folder)
    pixels = Photos(image_files(folder), resolution, channels=channels, background=background).stacked(tally=tally)
    _tell_left_out(folder)
    tally.tell(f"{folder.name!r}", background)
    return pixels
