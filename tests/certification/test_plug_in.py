"""The attack of a plug-in in certificates: named with the digest of its code, and worth nothing without it."""

import dataclasses
import json

import pytest
from guide_pages import files_of, plugged
from tiny_exam import PROTOCOL, sit_exam

from hf_immunize.certification import build_certificate
from hf_immunize.errors import RecordError
from hf_immunize.hub import verify_folder
from hf_immunize.plugins import load_plugins
from hf_immunize.records import AttackTrace, Certificate

NAMES = ("bias_finetune",)
EXAM = dataclasses.replace(PROTOCOL, attacks=(*NAMES, "ridge_probe"))
SETTINGS = {"bias_finetune": {"steps": (6,), "learning_rate": (1e-2,)}}


def failed(folder, rejudge=True):
    return [item.message for item in verify_folder(folder, rejudge=rejudge).findings if item.level == "fail"]


def test_a_certificate_rests_on_the_code_that_it_names(tmp_path, monkeypatch, exam_folders, exam_data):
    (base, subject), (file, _) = exam_folders, files_of("attack.md", tmp_path)
    with plugged(monkeypatch, file, names=NAMES):
        load_plugins()
        for folder, role in ((base, "control"), (subject, "subject")):
            sit_exam(folder, role, exam_data, names=NAMES, settings=SETTINGS)
        certificate = build_certificate(subject, base, exam_data[0], EXAM)
        certificate.write(subject / "certificate.json")
        (item,) = [item for item in certificate.plan.attacks if item.attack == "bias_finetune"]
        assert item.plugin.name == "bias_attack.py" and len(item.plugin.sha256) == 64
        trace = AttackTrace.read(next((subject / "traces" / "subject").glob("bias_finetune__*")))
        assert trace.config["plugin"] == item.plugin.sha256
        assert not failed(subject), "the same plug-in is here"
        assert any(line.startswith("other parameter-efficient fine-tuning") for line in certificate.not_run), (
            "a family by its author's word covers no line of the checklist")

    with plugged(monkeypatch):
        (told,) = failed(subject, rejudge=False)
        assert "'bias_finetune' is one of the plug-in bias_attack.py, which is not here: install it" in told
        with pytest.raises(RecordError, match="'bias_finetune' is one of a plug-in, which is not here"):
            build_certificate(subject, base, exam_data[0], EXAM)

    file.write_text(file.read_text().replace("1e-3, 1e-2, 1e-1", "1e-9"))
    with plugged(monkeypatch, file, names=NAMES):
        (told,) = failed(subject)
        assert f"with the source {item.plugin.sha256[:12]}…, here is bias_attack.py with" in told
        with pytest.raises(RecordError, match="in the version of the exam"):
            build_certificate(subject, base, exam_data[0], EXAM)

    loaded = json.loads((subject / "certificate.json").read_text())
    for entry in loaded["plan"]["attacks"]:
        entry["plugin"] = None
    Certificate.model_validate(loaded).write(subject / "certificate.json")
    (told,) = failed(subject, rejudge=False)
    assert "its attack 'bias_finetune' is none of this release, and no plug-in is told" in told
