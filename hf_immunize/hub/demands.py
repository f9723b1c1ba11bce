"""What a configuration makes the loader do beyond reading the files beside it: run code, or fetch from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from hf_immunize.hub.library import PIPELINE_FILE
from hf_immunize.hub.names import problem_with

_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
_WEIGHTS = "transformers_weights"
_VERSIONS = "configuration_files"
"""Names other files for other versions of transformers."""
_DEEPEST = 100


def is_configuration(name: str) -> bool:
    """Whether a file may hold such demands, by its name."""
    return name.endswith(("config.json", PIPELINE_FILE))


def code_in(name: str, data: bytes) -> list[str]:
    """What in a file would run code of a repository, if the loader is told to trust it: for a card and the gate."""
    loaded = _plain(data)
    found = [f"'auto_map' in {name}" for key, value in _entries(loaded) if key == "auto_map" and value]
    if name == PIPELINE_FILE and isinstance(loaded, dict) and not isinstance(loaded.get("_class_name", ""), str):
        found.append(f"a pipeline class of its own in {name}")
    return found[:1]


def custom_components(index: bytes, names: Mapping[str, Any]) -> list[str]:
    """Components of a pipeline whose class is a file of the repository: ``unet: [my_unet, MyUNet]``."""
    loaded = _plain(index)
    return [
        f"{component}/{entry[0]}.py"
        for component, entry in (loaded.items() if isinstance(loaded, dict) else ())
        if isinstance(entry, list) and entry and f"{component}/{entry[0]}.py" in names
    ]


def elsewhere_in(data: bytes) -> list[str]:
    """What in a file makes a loader fetch code from the Hub, or read other weights, without being told to trust it."""
    found = []
    for key, value in _entries(_plain(data)):
        if key in _KERNELS:
            kernels = value.values() if isinstance(value, dict) else [value]
            found += [f"{key} {kernel!r}, whose code is fetched from the Hub" for kernel in kernels
                      if isinstance(kernel, str) and "/" in kernel]
        if key == _VERSIONS and value:
            found.append(f"{key} {value!r}, which is read in the place of config.json and in no certificate")
        if key == _WEIGHTS and isinstance(value, str) and not _is_safe(value):
            found.append(f"{key} {value!r}, which is no safetensors file of this folder")
    return found


def _is_safe(name: str) -> bool:
    return problem_with(name) is None and name.endswith((".safetensors", ".safetensors.index.json"))


def _plain(data: bytes) -> Any:
    """Plain data as the loaders read it; None for what they cannot read either."""
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        return None


def _entries(loaded: Any, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth: sub-models keep their own configuration inside."""
    if depth < _DEEPEST:
        for value in loaded.values() if isinstance(loaded, dict) else loaded if isinstance(loaded, list) else ():
            yield from _entries(value, depth + 1)
        yield from loaded.items() if isinstance(loaded, dict) else ()
