"""Plug-ins: code of other people that registers attacks, objectives and families, and how it is told apart.

A plug-in is a module. It is found by the entry-point group ``hf_immunize.plugins`` of an installed distribution, or by
the environment variable ``HF_IMMUNIZE_PLUGINS``, which holds names of modules or paths of ``.py`` files with commas
between. It is imported when a name is asked for that this package does not have, and not before.
"""

from __future__ import annotations

import hashlib
import importlib.util
import linecache
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from types import FrameType

from hf_immunize.errors import ConfigError
from hf_immunize.records import Plugin

GROUP = "hf_immunize.plugins"
VARIABLE = "HF_IMMUNIZE_PLUGINS"

_lock = threading.RLock()
_loaded: dict[str, str] = {}
"""What told each plug-in that was imported by its module or path."""
_loading: list[str] = []
"""The plug-in that is being imported, innermost last."""


@dataclass(frozen=True)
class _Found:
    """One plug-in that is there to be imported."""

    target: str
    """Name of a module, or path of a file."""
    told: str
    """The distribution with its version, or the variable."""


def has_plugins() -> bool:
    """Whether there are any; none is imported to say so."""
    return any(True for _ in _found())


def load_plugins() -> tuple[str, ...]:
    """Import every plug-in that was not imported yet; names of all, with the distribution that each comes from.

    Raises:
        ConfigError: a plug-in that cannot be imported.
    """
    with _lock:
        if not _loading:  # a plug-in may itself ask for a name
            for plugin in _found():
                if plugin.target not in _loaded:
                    _import(plugin)
                    _loaded[plugin.target] = plugin.told
        return tuple(f"{target} ({told})" for target, told in _loaded.items())


def origin(frame: FrameType | None) -> Plugin:
    """What the code in a frame is part of: its name and the digest of its Python source.

    The source is that of the whole top-level package, or of the one file where there is no package.

    Raises:
        ConfigError: code without a source that can be read.
    """
    names = {} if frame is None else frame.f_globals
    module = str(names.get("__name__", "?"))
    root = module.partition(".")[0]
    package = getattr(sys.modules.get(root), "__path__", None) if root not in ("__main__", "builtins") else None
    if package:
        folder = Path(next(iter(package)))
        parts = {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.py"))}
    else:
        parts = {"": _text(names.get("__file__"), None if frame is None else frame.f_code.co_filename)}
    digest = hashlib.sha256()
    for name, text in parts.items():
        digest.update(f"{name}\n".encode() + text.replace(b"\r\n", b"\n"))
    told = _loading[-1] if _loading else module
    return Plugin(name=told, sha256=digest.hexdigest())


def _text(file: object, known_as: str | None) -> bytes:
    """The source of one file, or of one cell of a notebook."""
    if isinstance(file, str) and file.endswith(".py") and Path(file).is_file():
        return Path(file).read_bytes()
    lines = linecache.getlines(known_as) if known_as else []
    if not lines:
        raise ConfigError(
            f"expected code in a file or a notebook's cell, got {known_as or 'nothing'} without a source: what is "
            "registered goes into certificates by the digest of its source. Write it into a .py file and import it."
        )
    return "".join(lines).encode()


def _found() -> Iterator[_Found]:
    for entry in sorted(metadata.entry_points(group=GROUP)):
        about = entry.dist
        yield _Found(entry.value, entry.name if about is None else f"{about.name} {about.version}")
    for word in os.environ.get(VARIABLE, "").split(","):
        if word.strip():
            yield _Found(word.strip(), VARIABLE)


def _import(plugin: _Found) -> None:
    named = Path(plugin.target).name if plugin.target.endswith(".py") else plugin.target
    _loading.append(named if plugin.told == VARIABLE else plugin.told)
    try:
        if plugin.target.endswith(".py"):
            _import_file(Path(plugin.target))
        else:
            module, _, attribute = plugin.target.partition(":")
            made = import_module(module)
            if attribute:
                getattr(made, attribute)()
    except Exception as error:  # foreign code may raise anything
        raise ConfigError(
            f"expected the plug-in {plugin.target!r} of {plugin.told} to be imported, got {type(error).__name__}: "
            f"{error}: repair it, or take it away ({_remedy(plugin)})."
        ) from error
    finally:
        _loading.pop()


def _remedy(plugin: _Found) -> str:
    if plugin.told == VARIABLE:
        return f"out of the variable {VARIABLE}"
    return f"pip uninstall {plugin.told.partition(' ')[0]}"


def _import_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
