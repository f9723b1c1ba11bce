"""What the results of a stage depend on beside other stages: its options, and the local files and
plug-ins that they name."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_immunize.errors import ConfigError
from hf_immunize.plugins import has_plugins, load_plugins
from hf_immunize.records import sha256_file
from hf_immunize.stages.workflow.stages import Stage

_SOURCES = (
    "dataset", "_images", "model_name_or_path", "processor_name_or_path", "judge_path", "features_path", "source",
)  # fmt: skip
"""Ends of the names of options that may name local files."""
_MODELS = ("base_path", "model_path")
_UNREAD = {"pretrain": ("harmful_", "benign_"), "immunize": ("benign_",)}
"""Beginnings of the options of a task of classes that a verb does not read: a benign task that comes later, or other
splits of the harmful one, leave the base as it is. A task of concepts keeps what no other side names: it reads all."""
PLACES = ("_path", "_paths", "_dir", "output", *_SOURCES)
"""Ends of the names of options that may name a place, which is the same from wherever it is named."""
_OF_MODELS = (*_MODELS, "name_or_path", "judge_path", "features_path", "source")
_HELD = ("traces", "samples", "stages", "logs")


def read_of(stage: Stage, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, or what was found by their names, that decide the stage's results."""
    unread = _UNREAD.get(stage.verb, ()) if "primary_dataset" in stage.options else ()
    return {name: value for name, value in options.items() if not name.startswith(unread)}


def look(path: Path) -> dict[str, int]:
    """Size and time of a file, by which it is known again without reading it."""
    found = path.stat()
    return {"size": found.st_size, "time": found.st_mtime_ns}


def digest(value: Any) -> str:
    """SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def sources_of(stage: Stage, held: Mapping[str, Any]) -> dict[str, Any]:
    """Digests of the local files that options name: taken again only where a size or a time is another one."""
    digests: dict[str, Any] = {}
    for name, path in _named_files(stage).items():
        held_back = _HELD if name.endswith(_OF_MODELS) else ()
        files = list(_files(path, only=".safetensors" if name.endswith(_MODELS) else "", held=held_back))
        looks = digest([(str(file), *look(file).values()) for file in files])
        before = held.get(name) or {}
        content = before.get("content") if before.get("looks") == looks else None
        if content is None:
            content = digest([(os.path.relpath(file, path), sha256_file(file)) for file in files])
        # the looks of equal content are those of the record: what was only touched is not another source
        digests[name] = before if before.get("content") == content else {"looks": looks, "content": content}
    return digests | {name: {"content": content} for name, content in _plugins_of(stage).items()}


def _plugins_of(stage: Stage) -> dict[str, str]:
    """Digest of the code of each objective or attack that the stage names and a plug-in brings."""
    named = stage.options.get({"immunize": "objective", "attack": "attacks"}.get(stage.verb, ""))
    if not named or not has_plugins():
        return {}
    load_plugins()
    if stage.verb == "immunize":
        from hf_immunize.training.core.registry import plugin_sources

        return {f"objective {name}": content for name, content in plugin_sources(str(named)).items()}
    from hf_immunize.attacks import ATTACKS
    from hf_immunize.attacks.diffusion import DIFFUSION_ATTACKS

    names = named.split(",") if isinstance(named, str) else named
    found = {name: {**ATTACKS, **DIFFUSION_ATTACKS}.get(name) for name in names}
    return {f"attack {name}": one.plugin.sha256 for name, one in found.items() if one is not None and one.plugin}


def refuse_missing(stage: Stage, held: Mapping[str, Any]) -> None:
    """Raise ConfigError for a source that the stage's results came from and that is not there: a drive that is not
    mounted, another working directory. What was made of it stays where it is."""
    for found in held:
        before, _, name = found.rpartition(" of ")
        value = stage.options.get(name)
        if not isinstance(value, str) or before not in value:
            continue
        part = before or value
        if not Path(part).expanduser().exists():
            raise ConfigError(
                f"expected {part}, which {name} names and results of the stage {stage.name} came from, got nothing "
                f"there (from {Path.cwd()}): bring it back, or name another. Nothing was changed."
            )


def _named_files(stage: Stage) -> dict[str, Path]:
    """Local files and folders that a stage reads and no stage makes, by the names of their options."""
    found = {}
    made = stage.verb == "report" or bool(stage.needs)
    for name, value in read_of(stage, stage.options).items():
        if not isinstance(value, str) or not (name.endswith(_SOURCES) or (name in _MODELS and not made)):
            continue
        # a comma may lie in the name of a folder
        for part in [value] if Path(value).expanduser().exists() else value.split(","):
            path = Path(part).expanduser()
            if part and path.exists():
                found[name if part == value else f"{part} of {name}"] = path
    return found


def _files(path: Path, only: str = "", held: Sequence[str] = ()) -> Iterator[Path]:
    """The files of a source: of a table also the images that it names; of a model's folder without what an exam leaves
    in it, or the weights alone."""
    if path.is_file():
        yield path
        yield from _named_images(path)
        return
    seen: set[str] = set()
    for root, folders, names in os.walk(path, followlinks=True):
        seen.add(os.path.realpath(root))
        folders[:] = sorted(name for name in folders if name not in held and not name.startswith(".")
                            and os.path.realpath(os.path.join(root, name)) not in seen)  # a link to where one was
        found = (Path(root, name) for name in sorted(names) if name.endswith(only))
        yield from (file for file in found if file.is_file())


def _named_images(table: Path) -> Iterator[Path]:
    """Files that cells of a table of text name."""
    cells: set[str] = set()
    try:
        if table.suffix.lower() in (".csv", ".tsv"):
            with table.open(encoding="utf-8", newline="") as stream:
                for row in csv.reader(stream, delimiter="\t" if table.suffix.lower() == ".tsv" else ","):
                    cells.update(row)
        elif table.suffix.lower() in (".jsonl", ".ndjson"):
            for line in table.read_text(encoding="utf-8").splitlines():
                cells.update(value for value in json.loads(line).values() if isinstance(value, str))
    except (ValueError, AttributeError, csv.Error):  # whoever reads its rows says what is wrong
        return
    for cell in sorted(cells):
        if "." in cell and len(cell) < 1000 and (table.parent / cell).is_file():
            yield table.parent / cell
