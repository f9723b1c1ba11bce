"""One shape for everything written to disk: a frozen, strict pydantic model with a schema version."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from hf_immunize.errors import RecordError
from hf_immunize.records.files import atomic_write

SCHEMA_VERSION = 1


class Part(BaseModel):
    """A frozen piece of a record: unknown keys and NaN are refused; a missing value is null, never zero."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Record(Part):
    """A file on disk: a Part that knows its schema version and how to be written atomically and read strictly."""

    schema_version: int = SCHEMA_VERSION

    def write(self, path: str | Path) -> Path:
        """Write as indented JSON with a stable key order, atomically."""
        return atomic_write(path, self.dumps())

    def dumps(self) -> str:
        """The exact text that ``write`` writes."""
        return json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read and validate one record.

        Raises:
            RecordError: missing, truncated, not JSON, of another schema version, or with a field that does not fit.
        """
        source = Path(path)
        try:
            loaded: Any = json.loads(source.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise RecordError(f"expected a {cls.__name__} in {source}, got {error}: make it again.") from error
        version = loaded.get("schema_version") if isinstance(loaded, dict) else None
        if version != SCHEMA_VERSION:
            raise RecordError(
                f"expected schema version {SCHEMA_VERSION} in {source}, got {version!r}: read it with the release that "
                "wrote it, or make it again."
            )
        try:
            return cls.model_validate(loaded)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise RecordError(
                f"expected a valid {cls.__name__} in {source}, got a problem at '{where}': {first['msg']}. "
                "The file was changed by hand or by another release: make it again."
            ) from error


class Interval(Part):
    """A point estimate with its interval. A null bound is open: censored runs put no figure on it."""

    estimate: float | None
    low: float | None
    high: float | None
    level: float = 0.95
    samples: int
    """Number of paired seeds behind it."""
