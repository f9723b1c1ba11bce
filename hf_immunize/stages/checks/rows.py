"""The images of a run, looked at by their headers: all rows, labels and files, and only some pixels."""

from __future__ import annotations

import hashlib
import io
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from hf_immunize.data import (
    TaskArguments,
    find_columns,
    load_source,
    parse_fractions,
    parse_labels,
    read_classes,
    read_image,
)
from hf_immunize.data.classes import choose_rows
from hf_immunize.errors import ConfigError, DataError, ImmunizeError
from hf_immunize.stages.checks.findings import Finding

WANTED = {
    "primary": ("train", "validation", "test"),
    "harmful": ("defense", "attack", "validation", "test"),
    "benign": ("attack", "validation", "test"),
}
"""Splits that the stages ask each side for."""
_SAMPLED = 64
_FEW = 20
"""Different images a class should have at least, for figures that mean something."""
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
_TAIL = 64


@dataclass(frozen=True)
class Side:
    """The rows of one side of the task.

    Args:
        name: primary, harmful or benign.
        rows: ``datasets.Dataset`` with encoded images.
        column: of the images.
        chosen: places of the rows of the chosen classes.
        labels: their classes, by place in ``names``.
        names: of the classes.
        fractions: of the splits.
    """

    name: str
    rows: Any
    column: str
    chosen: Sequence[int]
    labels: Sequence[int]
    names: Sequence[str]
    fractions: dict[str, float]


def check_rows(arguments: TaskArguments) -> tuple[dict[str, Side], list[Finding]]:
    """The sides of a task of classes that can be read, and what was found about all of them."""
    sides: dict[str, Side] = {}
    found: list[Finding] = []
    for name in ("primary", "harmful", *(("benign",) if arguments.benign_dataset else ())):
        with _warnings() as told:
            try:
                side = read_side(arguments, name)
            except ImmunizeError as error:
                found.append(Finding(f"{name} data", "fails", str(error)))
                continue
        sides[name] = side
        found += [Finding(f"{name} data", "note", line) for line in told]
        found += [*_counts(side, arguments), *_files(side)]
    return sides, [*found, *_shared(sides)]


def read_side(arguments: TaskArguments, name: str) -> Side:
    """One side as the stages will read it, but for its pixels.

    Raises:
        DataError: a source that cannot be read, columns, labels or splits that do not fit.
    """
    own = {
        option: getattr(arguments, f"{name}_{option}")
        for option in ("dataset", "config", "split", "revision", "labels", "splits", "image_column", "label_column")
    }
    rows = load_source(own["dataset"], config=own["config"], split=own["split"], revision=own["revision"])
    shared = (arguments.image_column, arguments.label_column)
    image, label = find_columns(rows, own["image_column"], own["label_column"], side=name, shared=shared)
    classes = read_classes(rows, label, f"the {name} dataset")
    labels = parse_labels(own["labels"], classes, f"the {name} dataset")
    chosen, places, names = choose_rows(classes, labels, f"the {name} dataset")
    fractions = parse_fractions(own["splits"])
    if missing := [split for split in WANTED[name] if split not in fractions]:
        raise DataError(f"expected splits {list(WANTED[name])} in {name}_splits, got {own['splits']!r}: add {missing}.")
    return Side(name, rows, image, chosen, places, names, fractions)


def refuse_one_task(task: TaskArguments) -> None:
    """Raise ConfigError for two sides that are the same images of the same classes."""
    own = ("dataset", "config", "split", "revision", "labels", "image_column", "label_column")
    for one, other in (("primary", "harmful"), ("primary", "benign"), ("harmful", "benign")):
        source = getattr(task, f"{one}_dataset")
        if all(getattr(task, f"{one}_{option}") == getattr(task, f"{other}_{option}") for option in own):
            raise ConfigError(
                f"expected other classes as {other} than as {one}, got {source!r} for both: name the classes of each "
                f"with --{one}_labels and --{other}_labels, or another source."
            )


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """What the package warns of inside: files that are left out, rows without a label."""
    told: list[str] = []

    class _Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())

    logger, listener = logging.getLogger("hf_immunize"), _Listener(logging.WARNING)
    spreads = logger.propagate
    logger.addHandler(listener)
    logger.propagate = False
    try:
        yield told
    finally:
        logger.removeHandler(listener)
        logger.propagate = spreads


def _counts(side: Side, arguments: TaskArguments) -> list[Finding]:
    """How many images each class has, and whether they are enough."""
    counts = Counter(side.labels)
    least = min(counts.values())
    different = _different(side, [label for label, count in counts.items() if count < _FEW])
    part, splits = f"{side.name} data", len(side.fractions)
    few = [side.names[label] for label, count in counts.items() if different.get(label, count) < splits]
    if few and not arguments.drop_rare_classes:
        return [Finding(part, "fails", f"expected at least {splits} different images in every class, one for each "
                                       "split, "
                        f"got fewer in {few[:10]}: bring more, leave these classes out, or set drop_rare_classes: "
                        "true.")]
    most = max(counts.values())
    share = f"{least} to {most}" if least < most else str(least)
    told = f"{len(side.chosen)} images of {len(side.names)} classes, {share} each: "
    told += ", ".join(side.names[:8]) + (", …" if len(side.names) > 8 else "")
    if least < _FEW:
        told += f"; with fewer than {_FEW} images in a class, figures will be noise"
    return [Finding(part, "note" if least < _FEW else "ok", told)]


def _different(side: Side, labels: Sequence[int]) -> dict[int, int]:
    """How many different files each of some classes has: an image that is there five times lies in one split."""
    found: dict[int, set[bytes]] = {label: set() for label in labels}
    if found:
        for (data, path), label in zip(_encoded(side), side.labels, strict=True):
            if label in found and (data is not None or (path and Path(path).is_file())):
                found[label].add(hashlib.blake2b(Path(path or "").read_bytes() if data is None else data).digest())
    return {label: len(contents) for label, contents in found.items()}


def _files(side: Side) -> list[Finding]:
    """Files that are no whole image: by header and end of all, by the pixels of some and of those in doubt."""
    bad, doubt = [], []
    for place, (data, path) in enumerate(_encoded(side)):
        trouble = _trouble(data, path)
        if trouble == "":
            doubt.append(place)
        elif trouble is not None:
            bad.append(f"{path or f'row {side.chosen[place]}'} ({trouble})")
    step = max(1, len(side.chosen) // _SAMPLED)
    for place in dict.fromkeys([*doubt, *range(0, len(side.chosen), step)]):
        try:
            read_image(side.rows, side.chosen[place], side.column, f"the {side.name} dataset")
        except ImmunizeError as error:
            bad.append(str(error))
    part = f"{side.name} images"
    if bad:
        told = f"expected images that can be decoded, got {len(bad)} that cannot: {'; '.join(dict.fromkeys(bad[:5]))}"
        return [Finding(part, "fails", f"{told}. Remove or replace them.")]
    return [Finding(part, "ok", f"headers of all {len(side.chosen)} read, {min(len(side.chosen), _SAMPLED)} decoded")]


def _encoded(side: Side) -> Iterator[tuple[bytes | None, str | None]]:
    """Bytes or path of each image, as it is stored."""
    from datasets import Image as Column

    rows = side.rows.select_columns([side.column]).cast_column(side.column, Column(decode=False)).select(side.chosen)
    for batch in rows.iter(batch_size=1000):
        for value in batch[side.column]:
            yield (None, None) if value is None else (value.get("bytes"), value.get("path"))


def _trouble(data: bytes | None, path: str | None) -> str | None:
    """What is wrong with an image's file by its header; empty text for a file without the end of its kind, None for
    nothing."""
    if data is None and path is None:
        return "no image"
    try:
        source: Any = Path(path or "") if data is None else io.BytesIO(data)
        if data is None and "://" not in str(path) and source.stat().st_size == 0 or data == b"":
            return "an empty file"
        with Image.open(source) as image:
            kind, size = image.format or "", image.size
        if min(size) == 0:
            return f"an image of size {size}"
        end = _ENDS.get(kind)
        return "" if end is not None and end not in _tail(data, path) else None
    except Exception as error:  # Pillow raises many unrelated classes for what is no image
        return f"{type(error).__name__}: {error}"


def _tail(data: bytes | None, path: str | None) -> bytes:
    if data is not None:
        return data[-_TAIL:]
    with open(path or "", "rb") as file:
        file.seek(max(0, Path(path or "").stat().st_size - _TAIL))
        return file.read()


def _shared(sides: dict[str, Side]) -> list[Finding]:
    """Files that two sides have in common: only those of a size that both have are read."""
    sizes = {name: [_size(*file) for file in _encoded(side)] for name, side in sides.items()}
    found, names = [], list(sides)
    for place, one in enumerate(names):
        for other in names[place + 1 :]:
            common = set(sizes[one]) & set(sizes[other]) - {0}
            held = [_contents(sides[name], sizes[name], common) for name in (one, other)]
            both = sorted(held[0].keys() & held[1].keys(), key=lambda content: held[0][content])
            if both:
                rows = [sides[name].chosen[digests[both[0]]] for name, digests in zip((one, other), held, strict=True)]
                found.append(Finding(
                    f"{one} and {other}", "note", f"{len(both)} equal files on both sides, e.g. rows {rows[0]} and "
                    f"{rows[1]}: an image that is kept and shall not be learned contradicts itself. Remove them from "
                    "one of the two."
                ))  # fmt: skip
    return found or [Finding("sides", "ok", "no equal files on two sides")]


def _size(data: bytes | None, path: str | None) -> int:
    """Bytes of a file; 0 for one that is not on this disk."""
    try:
        return len(data) if data is not None else Path(path or "").stat().st_size
    except OSError:
        return 0


def _contents(side: Side, sizes: Sequence[int], common: set[int]) -> dict[str, int]:
    """A digest of each file of one of these sizes, and the place of its row."""
    found: dict[str, int] = {}
    for place, ((data, path), size) in enumerate(zip(_encoded(side), sizes, strict=True)):
        if size in common:
            content = Path(path or "").read_bytes() if data is None else data
            found.setdefault(hashlib.blake2b(content, digest_size=16).hexdigest(), place)
    return found
