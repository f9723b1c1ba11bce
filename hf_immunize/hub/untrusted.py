"""JSON and YAML that nobody vouches for: strict, unambiguous, bounded."""

from __future__ import annotations

import json
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from hf_immunize.errors import RecordError
from hf_immunize.records import SCHEMA_VERSION, Record

AnyRecord = TypeVar("AnyRecord", bound=Record)


def parse_json(data: bytes) -> Any:
    """Plain data. Raises RecordError for what is not UTF-8 JSON, repeats a key, holds NaN, or is nested too deep."""
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"expected JSON, got {error}: restore the file.") from error


def parse_record(kind: type[AnyRecord], data: bytes) -> AnyRecord:
    """A record from bytes that nobody vouches for. Raises RecordError for anything but one strict JSON object."""
    loaded = parse_json(data)
    version = loaded.get("schema_version") if isinstance(loaded, dict) else None
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise RecordError(
            f"expected schema version {SCHEMA_VERSION} of {kind.__name__}, got {version!r}: read it with the release "
            "that wrote it."
        )
    try:
        return kind.model_validate(loaded)
    except (ValidationError, RecursionError) as error:
        first: Any = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": "nested too deep"}
        where = ".".join(str(part) for part in first["loc"])
        raise RecordError(
            f"expected a valid {kind.__name__}, got a problem at '{where}': {first['msg']}. The file was changed."
        ) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys occur once: readers disagree on which of two counts."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("the same key twice in one object")
    return found


def unique_keys(loader: type) -> type:
    """A YAML loader that refuses a mapping with the same key twice, of which readers take either."""

    class Unique(loader):  # type: ignore[misc]  # a base that is known when it runs
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            if len({repr(key) for key in keys}) != len(keys):
                raise yaml.YAMLError("the same key twice in one mapping")
            return super().construct_mapping(node, deep)

    return Unique


def _no_constant(name: str) -> None:
    raise ValueError(f"{name}, which is not JSON")
