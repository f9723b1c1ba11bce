"""Certificates side by side: a table for each exam, who says so, and a page that runs nothing from them."""

import json

import pytest
import record_builders as build
from published import certified, failing, write_release
from typer.testing import CliRunner

from hf_immunize.cli import app
from hf_immunize.errors import RecordError
from hf_immunize.hub.leaderboard import COLUMNS, group_entries, keys_of, leaderboard_html, read_entries
from hf_immunize.hub.signature import make_key
from hf_immunize.records import Certificate


@pytest.fixture
def folders(tmp_path):
    return certified(tmp_path), failing(tmp_path)


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_models_of_one_exam_stand_in_one_table_with_who_says_so(folders, tmp_path):
    key = make_key(tmp_path / "key.pem")
    signed = write_release(folders[0], tmp_path / "signed", signing_key=tmp_path / "key.pem")
    (group,) = group_entries([*read_entries([signed], trusted_key=key), *read_entries([folders[1]])])
    assert group.title == "Same exam" and "LoRA" in group.families
    data = json.loads(run("compare", signed, folders[1], "--json").stdout)
    first, second = data[0]["models"]
    assert (first["model"], first["overall"], first["method"]) == ("signed", "RESISTS", "condition_number")
    assert second["overall"] == "FAILS" and second["LoRA"].startswith("FAILS, 1.1×")
    assert second["linear probing"].startswith("RESISTS") and first["LoRA"] == "–"
    assert first["who says so"] == "self-reported" and first["cost of immunization"] == "400 steps, 61 s"
    assert group.entries[0].found.trust.key == key
    shown = run("compare", *folders)
    assert shown.exit_code == 0 and "Same exam" in shown.output and "condition_number" in shown.output


def leave(folder, shares):
    """Write into a certificate how much of the uplift some attacks still get."""
    path = folder / "certificate.json"
    certificate = Certificate.read(path)
    cells = [cell.model_copy(update={"uplift_left": build.interval(shares[cell.attack], 0.1, None)})
             if cell.attack in shares else cell for cell in certificate.cells]
    certificate.model_copy(update={"cells": cells}).write(path)


def test_uplift_that_is_left_is_told_by_family_and_decides_whose_attack_is_shown(folders, tmp_path):
    leave(folders[0], {"linear_probe_gd": 0.25, "linear_probe_adam": 0.4})
    leave(folders[1], {"lora": 0.93, "linear_probe_adam": -0.04, "linear_probe_gd": -0.2})
    first, second = json.loads(run("compare", *folders, "--json").stdout)[0]["models"]
    assert first["linear probing"].startswith("RESISTS, 9×") and "(linear_probe_adam)" in first["linear probing"]
    assert "uplift left 40% (10 to open)" in first["linear probing"]
    assert first["uplift left"].endswith("(linear_probe_adam)")
    assert second["uplift left"] == "93% (10 to open) (lora)" and "uplift left 93%" in second["LoRA"]
    assert "uplift left −4% (10 to open)" in second["linear probing"]
    assert first["harmful task"] == second["harmful task"] == "scikit-learn digits"
    entries = read_entries(folders)
    places = [dict(zip((*COLUMNS, "LoRA"), keys_of(entry, ["LoRA"]), strict=True)) for entry in entries]
    assert [row["uplift left"] for row in places] == [0.4, 0.93] and places[0]["LoRA"] is None
    page = leaderboard_html(group_entries(entries))
    assert 'data-key="0.93"' in page and "uplift left" in page
    assert "uplift left 93%" in " ".join(run("diff", *folders).output.split())


@pytest.mark.parametrize("changes, named", [
    ({"rule": "another rule"}, "rule"), ({"protocol": "standard"}, "exam"),
    ({"threshold_rule": "by hand"}, "threshold"),
    ({"harmful_data": [build.dataset("harmful/test", "cars", ("a", "b"))]}, "harmful data"),
    ({"primary_data": [build.dataset("primary/test", "birds", ("a", "b"))]}, "primary data"),
])
def test_other_exams_are_kept_apart_and_it_says_why(folders, changes, named):
    path = folders[1] / "certificate.json"
    Certificate.read(path).model_copy(update=changes).write(path)
    groups = group_entries(read_entries(folders))
    assert [len(group.entries) for group in groups] == [1, 1]
    assert groups[1].title == f"Exam 2, NOT comparable with exam 1: another {named}"
    page = leaderboard_html(groups)
    assert page.count("<table>") == 2 and f"another {named}" in page
    assert "NOT comparable" in " ".join(run("compare", *folders).output.split())


def test_a_page_that_names_scripts_runs_none_of_them(tmp_path):
    evil = "<script>alert(1)</script>"
    entries = read_entries([certified(tmp_path, statement=evil, protocol=evil)])
    page = leaderboard_html(group_entries(entries))
    assert evil not in page and "&lt;script&gt;" in page and "http" not in page.replace("http-equiv", "")
    assert page.count("<script>") == 1 and "default-src 'none'" in page


def test_the_command_writes_the_page(folders, tmp_path):
    done = run("leaderboard", *folders, "-o", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert done.exit_code == 0 and page.count("<tr><td>") == 2 and "aria-sort" in page


def test_files_that_are_not_what_they_say_are_shown_as_unsound(folders):
    (folders[0] / "model.safetensors").write_bytes(b"changed")
    done = run("compare", *folders)
    assert done.exit_code == 3 and "UNSOUND" in done.output
    (folders[0] / "certificate.json").unlink()
    with pytest.raises(RecordError, match="expected a certificate in"):
        read_entries(folders)
    with pytest.raises(RecordError, match="at least one folder"):
        read_entries([])
