"""Attacks run again from the command line: a real, tiny exam on real digits, of random weights."""

import dataclasses
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from models import save_vit
from typer.testing import CliRunner

from hf_immunize.certification import Evidence, judge_traces
from hf_immunize.cli import app
from hf_immunize.hub import verify_folder
from hf_immunize.hub.signature import default_key_file, make_key
from hf_immunize.records import AttackTrace, Certificate, sha256_file

pytest.importorskip("sklearn", reason="the demo extra (scikit-learn), whose digits are the data, is not installed")
TASK = {"primary_dataset": "builder:digits", "harmful_dataset": "builder:digits", "primary_labels": "0,1,2",
        "harmful_labels": "5,6,7"}
SETTINGS = {"linear_probe_gd": {"steps": (100,), "learning_rate": (4.0,)},
            "ridge_probe": {"penalty": (1e-3,), "features": ("centered",)}}


@pytest.fixture(scope="module")
def sat(tmp_path_factory):
    """A folder with ``base``, ``model`` and ``task.yaml``, certified by the real exam of two attacks."""
    from hf_immunize.attacks import ATTACKS, AttackContext, load_processor, run_suite
    from hf_immunize.certification import ExamData, Protocol, build_certificate
    from hf_immunize.data import Task, TaskArguments

    root = tmp_path_factory.mktemp("sat")
    for seed, name in enumerate(("base", "model")):
        save_vit(root / name, seed=seed)
    (root / "task.yaml").write_text(yaml.safe_dump(TASK))
    options, processor = TaskArguments(**TASK), load_processor(root / "base")
    primary, harmful = Task(options, "primary"), Task(options, "harmful")
    splits = {role: harmful.pixels(role, processor) for role in ("attack", "validation", "test")}
    prints = tuple(harmful.fingerprint(split, role) for role, split in splits.items())
    for name, role in (("model", "subject"), ("base", "control")):
        context = AttackContext(folder=root / name, role=role, data=prints, attack_fraction=0.1, **splits)
        run_suite(context, ATTACKS, list(SETTINGS), (0, 1, 2), root / name, SETTINGS)
    test = primary.pixels("test", processor)
    data = ExamData(test, splits["attack"], (primary.fingerprint(test, "test"),), prints, task=options.described())
    protocol = Protocol(attacks=tuple(SETTINGS), seeds=(0, 1, 2))
    build_certificate(root / "model", root / "base", data, protocol).write(root / "model/certificate.json")
    return root


@pytest.fixture
def root(sat, tmp_path):
    return shutil.copytree(sat, tmp_path / "sat")


def run(root, *more, trials=2, task=True):
    done = CliRunner().invoke(app, [
        "verify", str(root / "model"), "--recheck", str(trials), "--base", str(root / "base"),
        *(["--task", str(root / "task.yaml")] if task else []), *more])
    return done, " ".join((done.output + done.stderr).split())


def test_a_sound_certificate_of_a_tenth_of_the_rows_holds(root):
    """The share of rows is read from the traces: a default of the release would accuse an honest publisher."""
    done, told = run(root, "--json", trials=4)
    found = json.loads(done.stdout)
    lines = [item["message"] for item in found["findings"] if item["code"] == "recheck"]
    assert done.exit_code == 0 and found["ok"] and all(line.endswith("it holds.") for line in lines), told
    assert {line.split()[2] for line in lines} == {"linear_probe_gd", "ridge_probe"}
    assert {line.split(" on the ")[1].split(":")[0] for line in lines} == {"subject", "control"}
    assert found["trust"]["told"] == "repeated by this machine (2 cells of 2)"


def test_without_a_task_file_the_options_in_the_certificate_are_taken(root):
    done, told = run(root, task=False)
    assert done.exit_code == 0 and "it holds" in told, told
    path = root / "model/certificate.json"
    Certificate.read(path).model_copy(update={"task": {}}).write(path)
    done, told = run(root, task=False)
    assert done.exit_code == 1 and "got none in the certificate: give the task file" in told


def test_the_command_of_the_documentation(root, monkeypatch):
    page = (Path(__file__).parents[2] / "docs/downloaded.md").read_text(encoding="utf-8")
    commands = re.findall(r"^hf-immunize (.*--recheck.*)$", page, re.M)
    assert len(commands) == 2
    make_key(default_key_file())
    monkeypatch.chdir(root)
    for command in commands:
        done = CliRunner().invoke(app, shlex.split(command))
        assert done.exit_code == 0 and "it holds" in done.output, done.output + done.stderr


def test_the_signed_record_is_published_beside_the_certificate_and_believed_by_who_names_its_key(root, tmp_path):
    checker = make_key(tmp_path / "checker.pem")
    done, told = run(root, "--record", str(root / "model"), "--sign-key", str(tmp_path / "checker.pem"),
                     "--recheck-seed", "7", trials=4)
    (path,) = (root / "model/rechecks").iterdir()
    assert done.exit_code == 0 and path.name == f"{checker[:16]}-7.json" and path.name in told
    found = verify_folder(root / "model", checker_keys=[checker])
    assert str(found.trust) == f"repeated by {checker} (2 cells of 2)"
    assert verify_folder(root / "model").trust.level == "self-reported"


def test_a_record_needs_a_key(root):
    done, told = run(root, "--record", str(root / "model"))
    assert done.exit_code == 1 and "expected a private key for --record" in told


def test_an_attack_of_ones_own_is_searched_for_and_the_strongest_told(root):
    done = CliRunner().invoke(app, [
        "verify", str(root / "model"), "--reattack", "3", "--base", str(root / "base"), "--recheck-seed", "2",
        "--json"])
    found = json.loads(done.stdout)
    (told,) = [item["message"] for item in found["findings"] if item["code"] == "reattack"]
    assert done.exit_code == 0 and told.startswith("the strongest of 3 attacks with other settings and seeds: ")
    assert re.search(r"(linear_probe_gd|ridge_probe) \(.+, seed \d{5,}\)", told) and "on the base" in told
    assert found["trust"]["level"] == "self-reported", "a search repeats nothing"


def lie(root, change):
    """Traces that were made up, every hash and verdict rebuilt: what passes --rejudge."""
    path = root / "model/certificate.json"
    certificate = Certificate.read(path)
    by_role = {}
    for name in certificate.traces:
        trace = change(AttackTrace.read(root / "model" / name))
        trace.write(root / "model" / name)
        by_role.setdefault(trace.role, []).append(trace)
    hashes = {name: sha256_file(root / "model" / name) for name in certificate.traces}
    evidence = dataclasses.replace(Evidence.of_certificate(certificate), traces=hashes)
    judge_traces(by_role, certificate.plan, certificate.judged_by, evidence).write(path)


def test_curves_that_were_made_up_pass_every_check_but_this_one(root):
    def flattened(trace):
        if trace.role == "control":
            return trace
        return trace.model_copy(update={"curve": [
            point.model_copy(update={"test": 0.3, "validation": 0.3}) for point in trace.curve]})

    lie(root, flattened)
    assert [str(item) for item in verify_folder(root / "model", rejudge=True).findings if item.level == "fail"] == []
    done, told = run(root, "--recheck-seed", "1", trials=4)
    assert done.exit_code == 3 and told.startswith("UNSOUND: ") and "it does not hold here" in told
    assert "certified 0.3" in told


def test_an_honest_certificate_follows_from_its_traces_and_goes_by_the_name_of_no_preset(root):
    found = verify_folder(root / "model", rejudge=True)
    assert found.ok and found.certificate.protocol == "custom" and "custom" in {item.code for item in found.findings}


def test_the_base_that_is_named_must_be_the_control(root):
    good = CliRunner().invoke(app, ["verify", str(root / "model"), "--base", str(root / "base")])
    assert good.exit_code == 0 and "its control has the weights of base" in " ".join(good.output.split())
    save_vit(root / "other", seed=5)
    bad = CliRunner().invoke(app, ["verify", str(root / "model"), "--base", str(root / "other")])
    assert bad.exit_code == 3 and "expected the certificate's control to be other" in " ".join(bad.output.split())


def test_what_cannot_be_attacked_again(root):
    bare = CliRunner().invoke(app, ["verify", str(root / "model"), "--recheck", "1"])
    assert bare.exit_code == 1 and "expected --base with --recheck" in bare.stderr
    (root / "task.yaml").write_text(yaml.safe_dump(TASK | {"split_seed": 1}))
    done, told = run(root)
    assert done.exit_code == 1 and "expected the harmful rows that the certificate names, got others" in told
    for content, message in (("primary_dataset: x", "expected harmful_dataset among"), ("tasks: 1", "got ['tasks']"),
                             ("[", "expected a task file"), ("- 1", "got list")):
        (root / "task.yaml").write_text(content)
        assert message in run(root)[1]
    (root / "task.yaml").write_text(yaml.safe_dump(TASK))
    save_vit(root / "base", seed=5)
    done, told = run(root)
    assert done.exit_code == 3 and "expected the certificate's control to be base, got other weights" in told
    (root / "model/model.safetensors").write_bytes(b"other")
    done, told = run(root)
    assert done.exit_code == 3 and "made again" not in told, "weights that were not examined were attacked"
