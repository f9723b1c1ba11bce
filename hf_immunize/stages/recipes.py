"""List the preset option files of this package, or copy them with the scripts that read them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from hf_immunize.errors import ConfigError, RunMismatchError
from hf_immunize.records import atomic_write

_PACKAGE = Path(__file__).parents[1]
_KINDS = (".yaml", ".json", ".md", ".py")
_SHARED = "accelerate"


def presets_folder() -> Path:
    """Where the presets lie: in the installed package, or beside it in a clone. Raises ConfigError for neither."""
    found = next((path for path in (_PACKAGE / "presets", _PACKAGE.parent / "recipes") if path.is_dir()), None)
    if found is None:
        raise ConfigError(f"expected presets in {_PACKAGE / 'presets'}, got none: install hf_immunize again.")
    return found


def find_presets() -> dict[str, list[str]]:
    """The option files of every preset, by its name."""
    root = presets_folder()
    folders = [path for path in sorted(root.iterdir()) if path.is_dir() and path.name != _SHARED]
    found = {path.name: sorted(file.relative_to(path).as_posix() for file in path.rglob("*.yaml")) for path in folders}
    return {name: files for name, files in found.items() if files}


def copy_presets(target: str | Path, names: Sequence[str] = ()) -> list[Path]:
    """Copy presets (all by default) to ``target/recipes``, with the scripts and hardware files that they go with.

    Raises:
        ConfigError: a name that is no preset.
        RunMismatchError: a file of another content is already there; nothing is copied then.
    """
    if unknown := sorted(set(names) - set(find_presets())):
        raise ConfigError(f"expected presets in {sorted(find_presets())}, got {unknown}.")
    root, copies = presets_folder(), {}
    for file in _files(root, names or list(find_presets())):
        copies[Path(target, "recipes", file.relative_to(root))] = file.read_bytes()
    if changed := [path for path, content in copies.items() if path.exists() and path.read_bytes() != content]:
        raise RunMismatchError(
            f"expected no other file of that name, got {changed[0]} and {len(changed) - 1} more with other content: "
            "copy to another folder."
        )
    return [atomic_write(path, content) for path, content in copies.items()]


def _files(root: Path, names: Sequence[str]) -> Iterator[Path]:
    """What belongs to these presets: their folders, the hardware files, the scripts."""
    yield from (file for file in sorted(root.glob("*.py")) if file.name != "__init__.py")
    for name in (_SHARED, *names):
        yield from (file for file in sorted((root / name).rglob("*")) if file.suffix in _KINDS and file.is_file())


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """The verb on words of a command line."""
    parser = argparse.ArgumentParser(description=__doc__, prog=prog)
    parser.add_argument("names", nargs="*", help="Presets; all by default.")
    parser.add_argument("--copy", metavar="FOLDER", help="Copy them to FOLDER/recipes.")
    parser.add_argument("--json", action="store_true", help="Print plain data for scripts.")
    given = parser.parse_args(argv)
    if given.copy is not None:
        print(f"{len(copy_presets(given.copy, given.names))} files copied to {Path(given.copy, 'recipes')}")
        return
    shown = {name: files for name, files in find_presets().items() if not given.names or name in given.names}
    if given.json:
        print(json.dumps(shown, indent=1))
    for name, files in shown.items() if not given.json else ():
        print(f"{name}: {', '.join(files)}")
