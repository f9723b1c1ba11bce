import json
import os

import pytest
import record_builders as build

from hf_immunize.errors import RecordError
from hf_immunize.report import render_report
from hf_immunize.report.evidence import read_evidence


@pytest.fixture
def world(tmp_path):
    return build.exam_folder(tmp_path), build.base_folder(tmp_path)


def edit_certificate(folder, change):
    path = folder / "certificate.json"
    loaded = json.loads(path.read_text())
    change(loaded)
    path.write_text(json.dumps(loaded))


def test_reads_traces_of_the_chosen_trial_only(world):
    folder, base = world
    (evidence,) = read_evidence([folder], base)
    runs = evidence.runs("linear_probe_gd", "subject")
    assert [run.seed for run in runs] == [0, 1, 2]
    assert {run.trial for run in runs} == {"learning_rate=0.1"}
    assert evidence.runs("reset_last_blocks", "subject") == [] == evidence.runs("no such attack", "subject")
    assert sum(run.outcome == "diverged" for run in evidence.traces) == 3


def test_no_folder_and_no_certificate(world, tmp_path):
    with pytest.raises(RecordError, match="at least one folder"):
        read_evidence([], world[1])
    with pytest.raises(RecordError, match="expected a Certificate"):
        read_evidence([tmp_path / "nowhere"], world[1])


def test_a_changed_trace_is_named(world):
    folder, base = world
    path = folder / "traces/subject/lora__learning_rate=0.1__seed0.json"
    path.write_text(path.read_text().replace("0.9", "0.8"))
    with pytest.raises(RecordError, match=r"lora__learning_rate=0\.1__seed0\.json.*not the one that was certified"):
        read_evidence([folder], base)


def test_a_missing_trace_is_named(world):
    folder, base = world
    (folder / "traces/control/lora__learning_rate=0.1__seed1.json").unlink()
    with pytest.raises(RecordError, match=r"traces/control/lora__learning_rate=0\.1__seed1\.json.*certify again"):
        read_evidence([folder], base)


@pytest.mark.parametrize("name", ["../outside.json", "/etc/hostname", "traces/../../outside.json"])
def test_a_certificate_cannot_make_the_report_read_outside(world, tmp_path, name):
    folder, base = world
    (tmp_path / "outside.json").write_text("{}")
    edit_certificate(folder, lambda loaded: loaded["traces"].update({name: "0" * 64}))
    with pytest.raises(RecordError, match="no such file below its traces folder"):
        read_evidence([folder], base)


def test_a_link_out_of_the_folder_is_refused(world, tmp_path):
    folder, base = world
    path = folder / "traces/subject/lora__learning_rate=0.1__seed0.json"
    path.rename(tmp_path / "elsewhere.json")
    os.symlink(tmp_path / "elsewhere.json", path)
    with pytest.raises(RecordError, match="no such file below its traces folder"):
        read_evidence([folder], base)


def test_uncertified_traces_are_counted_not_drawn(world):
    folder, base = world
    path = folder / "traces/subject/lora__learning_rate=0.1__seed0.json"
    (folder / "traces/subject/extra.json").write_bytes(path.read_bytes())
    (evidence,) = read_evidence([folder], base)
    assert evidence.unlisted == 1 and len(evidence.runs("lora", "subject")) == 3


def test_another_base_on_disk(world):
    folder, base = world
    (base / "model.safetensors").write_bytes(b"trained further")
    with pytest.raises(RecordError, match=r"difference in 'model\.safetensors'"):
        read_evidence([folder], base)


def test_models_of_different_bases_do_not_share_a_page(world, tmp_path):
    other = build.base_folder(tmp_path, "other")
    (other / "model.safetensors").write_bytes(b"another base")
    second = build.exam_folder(tmp_path, build.Exam(name="b", control=build.fingerprint(other, "other base")))
    with pytest.raises(RecordError, match="one report per base"):
        read_evidence([world[0], second], world[1])


def test_models_examined_on_different_data_do_not_share_a_page(world, tmp_path):
    second = build.exam_folder(tmp_path, build.Exam(name="b"))
    edit_certificate(second, lambda loaded: loaded["harmful_data"][0].update(sha256="ef" * 32))
    with pytest.raises(RecordError, match="expected the harmful data of"):
        read_evidence([world[0], second], world[1])


def test_equal_names_are_told_apart_by_folder(world, tmp_path):
    second = build.exam_folder(tmp_path / "second")
    labels = [item.label for item in read_evidence([world[0], second], world[1])]
    assert len(set(labels)) == 1  # same folder name too: nothing left to tell them apart by
    second = second.rename(tmp_path / "second/rerun")
    labels = [item.label for item in read_evidence([world[0], second], world[1])]
    assert labels == ["condition_number (condition_number)", "condition_number (rerun)"]


def test_nothing_is_written_when_a_record_does_not_fit(world, tmp_path):
    folder, base = world
    (folder / "immunization.json").write_text("{}")
    with pytest.raises(RecordError):
        render_report([folder], base, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
