"""Records of every version that was ever written stay readable, and say what they said."""

import gzip
import json
from pathlib import Path

import pytest

from hf_immunize.hub.tables import certificate_table
from hf_immunize.records import RULE_VERSION, Certificate, ImmunizationRecord
from hf_immunize.records.schema import shipped_schema

FOLDER = Path(__file__).parent / "released"
CERTIFICATES = sorted(FOLDER.glob("certificate-*.json.gz"))
IMMUNIZATIONS = sorted(FOLDER.glob("immunization-*.json.gz"))


def unpacked(path, into):
    name = f"{path.name.partition('-')[0]}.json"
    (into / name).write_bytes(gzip.decompress(path.read_bytes()))
    return into / name


def kept(before, after):
    """Whether everything that was written is still there; fields may have come in addition."""
    if isinstance(before, dict):
        return before.keys() <= after.keys() and all(kept(value, after[name]) for name, value in before.items())
    if isinstance(before, list):
        return len(before) == len(after) and all(map(kept, before, after))
    return before == after


def test_there_are_files_of_both_rules():
    assert len(CERTIFICATES) >= 2 and len(IMMUNIZATIONS) >= 2
    told = [json.loads(gzip.decompress(path.read_bytes())) for path in CERTIFICATES]
    assert [found.get("judged_by", {}).get("version") for found in told] == [None, RULE_VERSION]


@pytest.mark.parametrize("path", CERTIFICATES, ids=lambda path: path.name)
def test_an_old_certificate_is_read_shown_and_reported(path, tmp_path):
    written = json.loads(unpacked(path, tmp_path).read_text())
    certificate = Certificate.read(tmp_path / "certificate.json")
    assert certificate.overall == written["overall"] and certificate.statement == written["statement"]
    verdicts = {cell["attack"]: cell["verdict"] for cell in written["cells"]}
    assert {cell.attack: cell.verdict for cell in certificate.cells} == verdicts and len(verdicts) >= 8
    assert kept(written, json.loads(certificate.dumps())), "writing it again changes nothing that was there"
    assert certificate_table(certificate) is not None and certificate.overall in certificate._repr_html_()


@pytest.mark.parametrize("path", IMMUNIZATIONS, ids=lambda path: path.name)
def test_an_old_record_of_an_immunization_is_read(path, tmp_path):
    written = json.loads(unpacked(path, tmp_path).read_text())
    assert ImmunizationRecord.read(tmp_path / "immunization.json").steps == written["steps"]


@pytest.mark.parametrize("path", CERTIFICATES, ids=lambda path: path.name)
def test_an_outside_reader_with_todays_schema_reads_it_too(path):
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed: pip install jsonschema")
    loaded = json.loads(gzip.decompress(path.read_bytes()))
    jsonschema.Draft202012Validator(shipped_schema("certificate")).validate(loaded)
