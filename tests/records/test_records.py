"""Records survive a round trip, refuse what does not fit, and are written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_immunize.errors import RecordError, RunMismatchError
from hf_immunize.records import (
    Interval,
    ModelFingerprint,
    Provenance,
    RunRecord,
    atomic_write,
    begin_run,
    fingerprint_of,
    finish_run,
    sha256_file,
    weight_files,
)


def record(**changes) -> RunRecord:
    values = {
        "stage": "immunize", "fingerprint": "f", "inputs": {"a": 1}, "finished": False, "files": {},
        "provenance": Provenance.here(),
    }
    return RunRecord(**{**values, **changes})


def test_a_claim_of_a_run_that_left_nothing_does_not_bind(tmp_path):
    """Refused before its first step, corrected, and run again in the same folder."""
    inputs = {"options": {"per_device_harmful_batch_size": 3}}
    corrected = {"options": {"per_device_harmful_batch_size": 12}}
    assert begin_run(tmp_path, "immunize", inputs) is False
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "events.out.tfevents.1").write_text("a log")
    assert begin_run(tmp_path, "immunize", corrected) is False
    assert RunRecord.read(tmp_path / "run.json").inputs == corrected
    (tmp_path / "checkpoint-1").mkdir()
    assert begin_run(tmp_path, "immunize", inputs) is False  # an empty folder is nothing
    (tmp_path / "checkpoint-1" / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(RunMismatchError, match="differs in \\['options'\\]"):
        begin_run(tmp_path, "immunize", corrected)


def test_a_record_reads_back_equal(tmp_path):
    original = record()
    assert RunRecord.read(original.write(tmp_path / "run.json")) == original


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda text: text[: len(text) // 2], "expected a RunRecord"),
        (lambda text: text.replace('"schema_version": 1', '"schema_version": 99'), "schema version 1 .*got 99"),
        (lambda text: text.replace('"stage"', '"stagge"'), "a problem at"),
        (lambda text: text.replace('"finished": false', '"finished": "maybe"'), "a problem at 'finished'"),
        (lambda text: "[]", "got None"),
        (lambda text: "\x00\xff", "expected a RunRecord"),
    ],
    ids=["truncated", "version", "unknown key", "type", "not an object", "binary"],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, change, message):
    path = record().write(tmp_path / "run.json")
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="latin-1")
    with pytest.raises(RecordError, match=message):
        RunRecord.read(path)


def test_nan_is_not_a_measurement():
    with pytest.raises(ValueError, match="finite"):
        Interval(estimate=float("nan"), low=None, high=None, samples=3)


def test_a_write_that_fails_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch):
    target = tmp_path / "file.json"
    atomic_write(target, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RecordError, match="No space left on device: free disk space"):
        atomic_write(target, "new")
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=4))
def test_a_fingerprint_ignores_order_and_sees_values(inputs):
    assert fingerprint_of(inputs) == fingerprint_of(dict(reversed(inputs.items())))
    assert fingerprint_of(inputs) != fingerprint_of({**inputs, "one more key": 0})


def test_a_folder_holds_one_run(tmp_path):
    inputs = {"options": {"strength": 1}, "data": "abc"}
    assert begin_run(tmp_path, "immunize", inputs) is False
    assert begin_run(tmp_path, "immunize", inputs) is False  # started, not finished: resume
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    finish_run(tmp_path, "immunize", inputs, ["model.safetensors"])
    assert begin_run(tmp_path, "immunize", inputs) is True
    with pytest.raises(RunMismatchError, match="differs in \\['options'\\]"):
        begin_run(tmp_path, "immunize", {**inputs, "options": {"strength": 2}})
    with pytest.raises(RunMismatchError, match="differs in \\['stage'\\]"):
        begin_run(tmp_path, "pretrain", inputs)
    (tmp_path / "model.safetensors").write_bytes(b"other")
    with pytest.raises(RunMismatchError, match="changes in \\['model.safetensors'\\]"):
        begin_run(tmp_path, "immunize", inputs)


def test_weight_files_pass_over_checkpoints(tmp_path):
    for name in ("model.safetensors", "checkpoint-3/model.safetensors", "unet/model.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    assert [path.relative_to(tmp_path).as_posix() for path in weight_files(tmp_path)] == [
        "model.safetensors", "unet/model.safetensors",
    ]
    found = ModelFingerprint.of_folder(tmp_path, name="m", architecture="A", parameters=1)
    assert found.weights["model.safetensors"] == sha256_file(tmp_path / "model.safetensors")
    with pytest.raises(RecordError, match="expected safetensors weights"):
        weight_files(tmp_path / "nothing")


def test_provenance_names_no_place(tmp_path):
    text = json.dumps(Provenance.here().model_dump())
    assert str(Path.home()) not in text and os.uname().nodename not in text
    assert "torch" in Provenance.here().versions
