"""Verdicts recomputed from published traces; the traces are formulas, the judge is the real one."""

import dataclasses
import subprocess
import sys

import pytest
import record_builders as build
from published import EXPIRES, certified
from rejudged import judge_again

from hf_immunize.hub import verify_folder
from hf_immunize.records import Certificate

ATTACKS = tuple(attack for attack in build.ATTACKS if attack.ran)


@pytest.fixture
def judged(tmp_path):
    """A folder whose certificate follows from its traces."""
    attacks = [dataclasses.replace(attack, diverged=0) for attack in ATTACKS]
    folder = certified(tmp_path, "judged", attacks)
    judge_again(folder, build.plan_of(attacks))
    return folder


def failed(folder):
    return [item.message for item in verify_folder(folder, rejudge=True).findings if item.level == "fail"]


def change(folder, **fields):
    certificate = Certificate.read(folder / "certificate.json")
    certificate.model_copy(update=fields).write(folder / "certificate.json")


def test_a_certificate_that_follows_from_its_traces(judged):
    found = verify_folder(judged, rejudge=True)
    assert found.ok and "rejudge" not in {item.code for item in found.findings}
    assert {cell.verdict for cell in found.certificate.cells} == {"FAILS", "INCONCLUSIVE"}, "three seeds"


def test_a_verdict_that_was_written_in(judged):
    cells = Certificate.read(judged / "certificate.json").cells
    bent = [cell.model_copy(update={"verdict": "RESISTS"}) if cell.attack == "lora" else cell for cell in cells]
    change(judged, cells=bent)
    assert verify_folder(judged).ok, "without rejudging there is nothing to see in an unsealed folder"
    (told,) = failed(judged)
    assert "the cell of 'lora' is not what its traces give: verdict (verdict written RESISTS, judged FAILS)" in told


def test_a_figure_that_was_written_in(judged):
    cells = Certificate.read(judged / "certificate.json").cells
    side = cells[1].subject.model_copy(update={"accuracy": [0.1, 0.1, 0.1]})
    change(judged, cells=[cells[0], cells[1].model_copy(update={"subject": side}), *cells[2:]])
    (told,) = failed(judged)
    assert "'linear_probe_adam' is not what its traces give: subject" in told


def test_family_and_overall_verdicts_that_were_written_in(judged):
    families = Certificate.read(judged / "certificate.json").families
    change(judged, overall="RESISTS", families=[item.model_copy(update={"verdict": "RESISTS"}) for item in families])
    told = " ".join(failed(judged))
    assert "by family are not those of its cells" in told and "overall verdict is written RESISTS, judged FAILS" in told


def test_traces_that_were_left_out(judged):
    certificate = Certificate.read(judged / "certificate.json")
    kept = {name: digest for name, digest in certificate.traces.items() if "control/lora" not in name}
    change(judged, traces=kept)
    assert any("'lora'" in told for told in failed(judged))


def test_a_certificate_without_rule_or_plan_in_data_is_unsound(judged, tmp_path):
    change(judged, plan=None)
    assert any("its field 'plan' is missing" in told for told in failed(judged))
    assert any("its field 'judged_by' is missing" in told for told in failed(certified(tmp_path)))


@pytest.mark.parametrize("fields, named", [
    ({"rule": "RESISTS always."}, "'rule'"),
    ({"statement": "Nobody breaks it."}, "'statement'"),
    ({"not_run": []}, "'not_run'"),
    ({"expires": EXPIRES}, "'expires'"),
    ({"threshold_rule": "80 %"}, "'threshold_rule'"),
    ({"immunization_ratio": 1e9}, "'immunization_ratio'"),
    ({"protocol": "standard"}, "'protocol'"),
])
def test_every_field_is_compared(judged, fields, named):
    change(judged, **fields)
    (told,) = failed(judged)
    assert named in told


def test_a_rule_that_was_loosened_gives_other_words_and_verdicts(judged):
    rule = Certificate.read(judged / "certificate.json").judged_by
    change(judged, judged_by=rule.model_copy(update={"slow_down_factor": 1.01}))
    told = failed(judged)
    assert any("'rule'" in line for line in told) and any("'judged_by' is not the rule" in line for line in told)
    change(judged, judged_by=rule.model_copy(update={"version": 99}))
    assert any("'judged_by' is a rule of version 99" in line for line in failed(judged))


def test_an_attack_that_was_taken_out_of_cells_and_plan(judged):
    certificate = Certificate.read(judged / "certificate.json")
    plan = certificate.plan.model_copy(update={"attacks": certificate.plan.attacks[:-1]})
    change(judged, plan=plan)
    assert any("full_finetune" in told for told in failed(judged))


def test_the_judge_needs_no_torch():
    code = "import sys, hf_immunize.certification; print({'torch', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("words", [[], ["--rejudge"]])
def test_verifying_and_judging_again_need_no_torch_and_little_time(judged, words):
    code = ("import sys, time\nfrom hf_immunize.cli import app\n"
            "try:\n    app(sys.argv[1:])\nexcept SystemExit as done:\n"
            "    print(done.code, {'torch', 'transformers'} & {*sys.modules}, time.process_time() < 1.5)")
    done = subprocess.run([sys.executable, "-c", code, "verify", str(judged), *words], capture_output=True, text=True,
                          check=True)
    assert done.stdout.splitlines()[-1] == "0 set() True", done.stdout
