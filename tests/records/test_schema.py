"""Schemas shipped with the package, and what a certificate cannot leave out."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

import record_builders as build
from trace_builders import reaching

from hf_immunize.errors import RecordError
from hf_immunize.records import Certificate
from hf_immunize.records.schema import SCHEMAS, make_schema, shipped_schema, write_schemas


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_shipped_schema_is_that_of_the_class(name, tmp_path):
    assert shipped_schema(name) == make_schema(name), "run python -m hf_immunize.records.schema"
    assert shipped_schema(name)["additionalProperties"] is False
    assert {path.name for path in write_schemas(tmp_path)} == {f"{known}.schema.json" for known in SCHEMAS}


@pytest.mark.parametrize("function", [make_schema, shipped_schema])
def test_an_unknown_record_has_no_schema(function):
    with pytest.raises(RecordError, match="expected a record in .*got 'diary'"):
        function("diary")


def test_an_outside_reader_accepts_what_is_written_and_refuses_what_is_not(tmp_path):
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed: pip install jsonschema")
    folder = build.exam_folder(tmp_path)
    loaded = json.loads((folder / "certificate.json").read_text())
    reader = jsonschema.Draft202012Validator(shipped_schema("certificate"))
    jsonschema.Draft202012Validator.check_schema(shipped_schema("certificate"))
    reader.validate(loaded)
    jsonschema.validate(json.loads(reaching(5).dumps()), shipped_schema("attack_trace"))
    jsonschema.validate(json.loads((folder / "immunization.json").read_text()), shipped_schema("immunization"))
    for change in ({"overall": "PROVEN"}, {"cells": None}, {"extra": 1}, {"schema_version": 2}):
        assert not reader.is_valid(loaded | change), change
    assert not reader.is_valid({key: value for key, value in loaded.items() if key != "planned"})


def drop_cell(loaded):
    loaded["cells"] = [cell for cell in loaded["cells"] if cell["attack"] != "lora"]
    loaded["families"] = [family for family in loaded["families"] if family["attacks"] != ["lora"]]


def drop_cell_and_plan(loaded):
    drop_cell(loaded)
    loaded["planned"].remove("lora")


def plan_more(loaded):
    loaded["planned"].append("magic")


def drop_family(loaded):
    loaded["families"] = loaded["families"][1:]


def succeed(loaded):
    loaded["overall"] = "RESISTS"


def invent(loaded):
    loaded["cells"][-1]["verdict"] = "RESISTS"


def twice(loaded):
    loaded["cells"].append(loaded["cells"][0])


@pytest.mark.parametrize("edit, message", [
    (drop_cell, "every attack that was planned or run has a cell, lora has none"),
    (drop_cell_and_plan, "every attack that was planned or run has a cell, lora has none"),
    (plan_more, "has a cell, magic has none"),
    (drop_family, "every cell belongs to one family"),
    (succeed, "an exam with an attack that was not run has no success"),
    (invent, "a verdict has figures of subject and control, reset_last_blocks has none"),
    (twice, "an attack has one cell"),
])
def test_no_cell_can_be_left_out(tmp_path, edit, message):
    path = build.exam_folder(tmp_path) / "certificate.json"
    loaded = json.loads(path.read_text())
    edit(loaded)
    path.write_text(json.dumps(loaded))
    with pytest.raises(RecordError, match=message):
        Certificate.read(path)
