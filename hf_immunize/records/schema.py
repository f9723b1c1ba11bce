"""JSON Schemas of what is written to disk, for readers without this package. Shipped beside it in ``schemas/``.

``python -m hf_immunize.records.schema`` writes them again after a record was changed. What a schema cannot say, that
every planned attack has its cell, is checked whenever a record is read.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from hf_immunize.errors import RecordError
from hf_immunize.records.base import SCHEMA_VERSION, Record
from hf_immunize.records.certificate import Certificate
from hf_immunize.records.files import atomic_write
from hf_immunize.records.immunization import ImmunizationRecord
from hf_immunize.records.trace import AttackTrace

SCHEMAS: dict[str, type[Record]] = {
    "certificate": Certificate,
    "attack_trace": AttackTrace,
    "immunization": ImmunizationRecord,
}
_FOLDER = "schemas"


def make_schema(name: str) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of one kind of record, from its class. Raises RecordError for an unknown kind."""
    if name not in SCHEMAS:
        raise RecordError(f"expected a record in {sorted(SCHEMAS)}, got {name!r}.")
    made = SCHEMAS[name].model_json_schema()
    made["properties"]["schema_version"]["const"] = SCHEMA_VERSION
    made["required"] = sorted({*made["required"], "schema_version"})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made}


def shipped_schema(name: str) -> dict[str, Any]:
    """The same as it lies in the package. Raises RecordError for an unknown kind."""
    if name not in SCHEMAS:
        raise RecordError(f"expected a record in {sorted(SCHEMAS)}, got {name!r}.")
    found = resources.files("hf_immunize.records") / _FOLDER / f"{name}.schema.json"
    loaded: dict[str, Any] = json.loads(found.read_text(encoding="utf-8"))
    return loaded


def write_schemas(folder: Path | None = None) -> list[Path]:
    """Write every schema; by default into the package."""
    target = folder or Path(__file__).parent / _FOLDER
    return [
        atomic_write(target / f"{name}.schema.json", json.dumps(make_schema(name), indent=1, ensure_ascii=False) + "\n")
        for name in SCHEMAS
    ]


if __name__ == "__main__":
    for path in write_schemas():
        print(path.name)
