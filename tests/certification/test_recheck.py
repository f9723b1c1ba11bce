import dataclasses
import importlib

import pytest
from tiny_exam import PROTOCOL

from hf_immunize.attacks import AttackContext
from hf_immunize.certification import Recheck, build_certificate, recheck
from hf_immunize.errors import RecordError
from hf_immunize.records import Certificate, Interval


@pytest.fixture
def certified(exam_folders, exam_data):
    base, subject = exam_folders
    data, splits = exam_data
    build_certificate(subject, base, data, PROTOCOL).write(subject / "certificate.json")
    contexts = {
        role: AttackContext(folder=folder, role=role, data=data.harmful, **splits)
        for role, folder in (("subject", subject), ("control", base))
    }
    return subject, contexts


def test_a_sound_certificate_holds_when_it_is_sat_again(certified):
    subject, contexts = certified
    found = recheck(subject, contexts, 3, 0, PROTOCOL.rule)
    assert {line.attack for line in found} == {"linear_probe_gd", "ridge_probe", "full_finetune"}
    assert {line.measure for line in found} == {"accuracy_drop", "slow_down"}
    assert all(line.agrees for line in found), found


def test_which_cells_are_drawn_is_the_seeds(certified):
    subject, contexts = certified
    drawn = {tuple(sorted({line.attack for line in recheck(subject, contexts, 1, seed, PROTOCOL.rule)}))
             for seed in range(6)}
    assert len(drawn) > 1


def test_one_row_that_rounding_decides_is_no_disagreement_where_seeds_came_out_alike(certified, monkeypatch):
    """Another processor: the subject's accuracy is one test row lower, then two, on every seed."""
    subject, contexts = certified
    certificate = Certificate.read(subject / "certificate.json")
    alike = [
        cell.model_copy(update={"accuracy_drop": Interval(estimate=0.0, low=0.0, high=0.0, samples=3)})
        for cell in certificate.cells
    ]
    certificate.model_copy(update={"cells": alike}).write(subject / "certificate.json")
    rows, module = certificate.harmful_data[-1].rows, importlib.import_module("hf_immunize.certification.repeating")
    for lost, agrees in ((1, True), (2, False)):
        drop = Interval(estimate=lost / rows, low=None, high=None, samples=3)
        monkeypatch.setattr(module, "build_cell", lambda *args, drop=drop: certificate.cells[0].model_copy(
            update={"accuracy_drop": drop}))
        found = [line for line in recheck(subject, contexts, 3, 0, PROTOCOL.rule) if line.measure == "accuracy_drop"]
        assert [line.agrees for line in found] == [agrees] * 3, found
        assert (f"one test row is {1 / rows:.3g}" in found[0].told) == agrees


def test_a_flattered_certificate_is_found_out(certified):
    subject, contexts = certified
    certificate = Certificate.read(subject / "certificate.json")
    flattered = [
        cell.model_copy(update={"slow_down": Interval(estimate=9.0, low=7.0, high=12.0, samples=3)})
        for cell in certificate.cells
    ]
    certificate.model_copy(update={"cells": flattered}).write(subject / "certificate.json")
    found = recheck(subject, contexts, 3, 0, PROTOCOL.rule)
    assert [line.agrees for line in found if line.measure == "slow_down"] == [False, False]


def test_other_weights_and_other_traces_are_refused(certified):
    subject, contexts = certified
    path = sorted((subject / "traces" / "subject").glob("ridge_probe*"))[0]
    path.write_text(path.read_text().replace("0.", "0.0", 1))
    with pytest.raises(RecordError, match="as it was certified, got another or no file"):
        recheck(subject, contexts, 3, 0, PROTOCOL.rule)
    (subject / "model.safetensors").write_bytes(b"other")
    fresh = {role: dataclasses.replace(context, _features={}) for role, context in contexts.items()}
    vars(fresh["subject"])["_saved"] = contexts["control"]._saved  # the bytes above are no model
    with pytest.raises(RecordError, match="expected the subject's weights to be those of the certificate"):
        recheck(subject, fresh, 3, 0, PROTOCOL.rule)


@pytest.mark.parametrize("low, high, found, agrees", [
    (1.0, 2.0, 1.5, True),
    (1.0, 2.0, 2.5, False),
    (1.0, None, 99.0, True),
    (None, 2.0, 0.1, True),
    (1.0, 2.0, None, False),
])
def test_agreement(low, high, found, agrees):
    stored = Interval(estimate=1.5, low=low, high=high, samples=3)
    assert Recheck("a", "slow_down", stored, found).agrees is agrees
