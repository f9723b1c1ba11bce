"""The command line on local folders, in process; publishing in a process of its own against the loopback Hub."""

import datetime
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "hub")]

from loopback import Loopback  # noqa: E402
from published import EXPIRES, TOKEN, certified, failing, write_release  # noqa: E402
from zygote import Zygote  # noqa: E402

from hf_immunize.cli import app  # noqa: E402
from hf_immunize.commands.app import STAGES  # noqa: E402
from hf_immunize.records import Certificate  # noqa: E402

COMMANDS = ("publish", "verify", "recheck", "card", "show", "report", "diff", "keygen", "compare", "leaderboard")


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """The folder of a model that two attackers break."""
    return failing(tmp_path_factory.mktemp("broken"))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_examples_in_its_help(command):
    done = run(command, "--help")
    assert done.exit_code == 0 and "Example" in done.output and f"hf-immunize {command} " in done.output


def test_the_commands_are_the_documented_ones():
    assert set(COMMANDS) == {command.callback.__name__ for command in app.registered_commands}


@pytest.mark.parametrize("verb", STAGES)
def test_every_stage_is_a_verb_that_explains_its_options(verb):
    shown = run("--help").output
    assert f"\n  {verb} " in shown
    done = run(verb, "--help")
    options = {"recipes": "--copy", "linear": "--data_dir", "cards": "--license", "pretrain": "--trainable_modules",
               "profile": "--model_path", "init": "--harmful", "plan": "--json", "run": "--from", "fetch": "--source",
               "immunize": "--objective", "attack": "--tuning_seeds", "certify": "--recheck"}
    assert done.exit_code == 0 and options[verb] in done.output and f"usage: hf-immunize {verb}" in done.output


def test_a_stage_without_what_it_needs_leaves_as_a_usage_error():
    for verb in ("attack", "certify", "immunize"):
        done = run(verb)
        assert done.exit_code == 2 and "--primary_dataset" in done.output + done.stderr
    done = run("attack", "--family", "poems")
    assert done.exit_code == 1 and "got 'poems'" in done.stderr


def test_verify_exit_codes(tmp_path):
    folder = write_release(certified(tmp_path), tmp_path / "published")
    good = run("verify", folder)
    first, *_ = good.output.splitlines()
    assert good.exit_code == 0 and "VERIFIED" not in good.output
    assert first == "Self-reported. Intact: the files are what the certificate says. It says: RESISTS."
    (tmp_path / "strict.yaml").write_text("start_from: research\nrejudged: false\nfamilies: {LoRA: RESISTS}")
    unmet = run("verify", folder, "--policy", tmp_path / "strict.yaml")
    assert unmet.exit_code == 4 and "which was not examined" in " ".join(unmet.output.split())
    (folder / "model.safetensors").write_bytes(b"changed")
    bad = run("verify", folder)
    assert bad.exit_code == 3 and "model.safetensors" in bad.output and bad.output.startswith("UNSOUND: ")
    assert run("verify").exit_code == 2
    assert run("verify", "nonsense").exit_code == 1


def test_verify_as_data(tmp_path):
    folder = write_release(certified(tmp_path), tmp_path / "published")
    data = json.loads(run("verify", folder, "--json").stdout)
    assert data["ok"] and data["overall"] == "RESISTS" and data["expires"] == EXPIRES
    assert data["families"] == {"linear probing": "RESISTS"} and "model.safetensors" in data["sha256"]
    (folder / "config.json").write_text("{}")
    data = json.loads(run("verify", folder, "--json").stdout)
    failed = {item["file"] for item in data["findings"] if item["level"] == "fail"}
    assert not data["sound"] and failed == {"config.json"}


def test_verify_with_a_trusted_key(tmp_path):
    keys = [run("keygen", tmp_path / f"{name}.pem").stdout.strip() for name in "ab"]
    folder = write_release(certified(tmp_path), tmp_path / "published", signing_key=tmp_path / "a.pem")
    (tmp_path / "a.pub").write_text(keys[0] + "\n")
    assert run("verify", folder, "--trusted-key", keys[0]).exit_code == 0
    assert run("verify", folder, "--trusted-key", tmp_path / "a.pub").exit_code == 0
    assert run("verify", folder, "--trusted-key", keys[1]).exit_code == 3
    assert run("verify", folder, "--trusted-key", "nobody").exit_code == 1
    assert run("keygen", tmp_path / "a.pem").exit_code == 1


def test_errors_without_traceback_unless_asked(tmp_path):
    done = run("publish", tmp_path, "me/model")
    assert done.exit_code == 3 and "no model is published without a certificate" in done.stderr
    assert "Traceback" not in done.output + done.stderr
    loud = run("--debug", "publish", tmp_path, "me/model")
    assert type(loud.exception).__name__ == "PublishRefusedError"


def test_unexpected_errors_have_no_traceback_either(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_immunize.hub.verify_model", lambda *_, **__: [].pop())
    done = run("verify", tmp_path)
    assert done.exit_code == 1 and "Unexpected IndexError" in done.stderr and "--debug" in done.stderr


def test_card(tmp_path):
    folder = certified(tmp_path)
    shown = run("card", folder, "--stdout", "--license", "mit", "--repo-id", "me/model").stdout
    assert "license: mit" in shown and not (folder / "README.md").exists()
    assert run("card", folder, "--license", "mit").exit_code == 0
    assert run("card", folder, "--repo-id", "me/model").exit_code == 0
    assert (folder / "README.md").read_text() == shown, "options given before were forgotten"
    assert run("card", folder, "--pipeline-tag", "nonsense").exit_code == 1


def test_show(tmp_path):
    folder = failing(tmp_path)
    done = run("show", folder)
    certificate = Certificate.read(folder / "certificate.json")
    assert done.exit_code == 0 and all(cell.attack in done.output for cell in certificate.cells)
    assert done.output.index("ridge_probe") < done.output.index("linear_probe_adam"), "failures come first"
    assert json.loads(run("show", folder, "--json").stdout) == certificate.model_dump(mode="json")
    (folder / "model.safetensors").write_bytes(b"changed")
    assert run("show", folder).exit_code == 3


def test_show_prints_names_as_they_are(tmp_path):
    folder = certified(tmp_path, statement="[bold red]markup[/] \x1b[31m and [link=https://evil.example]x[/link]")
    output = run("show", folder).output
    assert "\x1b[31m" not in output and "[link=https://evil.example]" in output.replace("\n", "")


def test_the_verdicts_of_a_report_are_inert_too(tmp_path):
    from hf_immunize.hub.tables import verdicts_table

    certificate = Certificate.read(certified(tmp_path) / "certificate.json")
    subject = certificate.subject.model_copy(update={"name": "[red]x[/]\x1b[31m"})
    named = certificate.model_copy(update={"subject": subject})
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(verdicts_table([named, certificate]))
    shown = console.export_text()
    assert "[red]x[/]" in shown and "\x1b" not in shown and shown.count("RESISTS") >= 4


def test_report(tmp_path):
    folder = certified(tmp_path)
    done = run("report", folder, "--base", tmp_path / "base", "-o", tmp_path / "page.html")
    assert done.exit_code == 0 and "<html" in (tmp_path / "page.html").read_text()
    assert run("report", folder, "--base", folder).exit_code == 1
    (tmp_path / "report.yaml").write_text(f"model_paths: [{folder}]\nbase_path: {tmp_path / 'base'}\n")
    again = run("report", "--config", tmp_path / "report.yaml", "--output", tmp_path / "again.html")
    assert again.exit_code == 0 and (tmp_path / "again.html").read_text() == (tmp_path / "page.html").read_text()
    assert "RESISTS" in again.output
    both = run("report", "--model_paths", folder, failing(tmp_path / "other"), "--output", tmp_path / "both.html")
    assert both.exit_code == 0 and "FAILS" in both.output and "RESISTS" in both.output
    assert run("report").exit_code == 2


def test_diff(tmp_path):
    first, second = certified(tmp_path), failing(tmp_path)
    same = run("diff", first, first / "certificate.json")
    assert same.exit_code == 0 and "say the same" in same.output
    rows = json.loads(run("diff", first, second, "--json").stdout)
    told = {row["what"]: (row["first"], row["second"]) for row in rows}
    assert told["overall"] == ("RESISTS", "FAILS") and told["lora"][0] == "not in the certificate"
    assert "linear_probe_adam" not in told and "expires" not in told
    assert run("diff", first, second).exit_code == 1
    assert "expected a Certificate" in run("diff", first, tmp_path).stderr


def test_publish_from_the_command_line(tmp_path):
    folder = failing(tmp_path)
    with Loopback(token=TOKEN) as hub:
        zygote = Zygote(os.environ | {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1",
                                      "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HOME": str(tmp_path / "home")})

        def run_apart(*arguments):
            return zygote.run(["hf-immunize", *map(str, arguments)], tmp_path)

        (tmp_path / "policy.yaml").write_text("rejudged: false")
        asked = ("--policy", tmp_path / "policy.yaml")
        dry = run_apart("publish", folder, "me/model", "--dry-run", "--allow-failed", *asked)
        assert dry.returncode == 0 and "nothing was sent" in dry.stdout and hub.requests == []
        refused = run_apart("publish", folder, "me/model", *asked)
        assert refused.returncode == 4 and "the policy asks for RESISTS overall" in refused.stderr
        assert hub.requests == []
        done = run_apart("publish", folder, "me/model", "--allow-failed", "--private", "--license", "mit",
                         "--json", *asked)
        data = json.loads(done.stdout)
        assert done.returncode == 0 and data["confirmed"] and data["revision"] == hub.head("me/model").oid
        assert hub.repositories["me/model"].private
        assert b"license: mit" in hub.head("me/model").files["README.md"]
        checked = run_apart("verify", "me/model", "--revision", data["revision"])
        assert checked.returncode == 0 and "It says: FAILS" in checked.stdout
        gone = run_apart("verify", "me/nothing")
        assert gone.returncode == 5 and "HTTP 404" in gone.stderr
        zygote.close()
    assert TOKEN not in "".join(done.stdout + done.stderr for done in (dry, refused, done, checked, gone))


@pytest.mark.parametrize(
    ("text", "told"),
    [("overal: RESISTS", "got ['overal']"), ("- 1", "got list"), ("families: [LoRA]", "a mapping"),
     ("overall: GREAT", "got 'GREAT'"), ("max_primary_drop: yes", "a number"), ("a: [", "a policy in"),
     ("issued_after: soon", "an ISO date"), ("min_seeds: 1.5", "a whole number"), ("signed: 1", "true or false"),
     ("families: {LoRA: NOT RUN}", "got 'NOT RUN'"), ("undecided: lora", "a list of attacks"),
     ("start_from: hope", "start_from out of research, release, strict"), ("trust: blind", "got 'blind'"),
     ("overall: INCONCLUSIVE", "an undecided attack counts as failed")],
)
def test_policies_that_cannot_be_used(tmp_path, broken, text, told):
    (tmp_path / "policy.yaml").write_text(text)
    done = run("verify", broken, "--policy", tmp_path / "policy.yaml")
    assert done.exit_code == 1 and told in " ".join(done.stderr.split())


TOMORROW = datetime.date.today() + datetime.timedelta(days=1)


@pytest.mark.parametrize(
    ("text", "met"),
    [("", True), ("overall: FAILS", True), ("overall: RESISTS", False),
     ("families: {linear probing: RESISTS}", True),
     ("families: {LoRA: RESISTS}", False), ("families: {LoRA: FAILS}", True), ("families: {Muon: FAILS}", False),
     ("max_primary_drop: 1.0", True), ("max_primary_drop: 0.9", False), ("min_seeds: 3", True), ("min_seeds: 4", False),
     ("signed: true", False), ("issued_after: 2020-01-01", True), (f"issued_after: {TOMORROW}", False),
     ("families: {benign trainability: RESISTS}", False)],
)
def test_policies(tmp_path, broken, text, met):
    (tmp_path / "policy.yaml").write_text(f"start_from: research\nrejudged: false\n{text}")
    done = run("verify", broken, "--policy", tmp_path / "policy.yaml")
    assert done.exit_code == (0 if met else 4)


def test_a_policy_for_a_complete_exam(tmp_path):
    import record_builders as build

    folder = certified(tmp_path, "partial", build.ATTACKS)
    (tmp_path / "policy.yaml").write_text("start_from: research\nrejudged: false\ncomplete_exam: true")
    done = run("verify", folder, "--policy", tmp_path / "policy.yaml")
    assert done.exit_code == 4 and "not run: reset_last_blocks" in " ".join(done.output.split())
    (tmp_path / "policy.yaml").write_text("start_from: research\nrejudged: false\ncomplete_exam: false")
    assert run("verify", folder, "--policy", tmp_path / "policy.yaml").exit_code == 0


def test_the_package_itself_is_the_command():
    done = subprocess.run([sys.executable, "-m", "hf_immunize", "verify", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "certificate" in done.stdout


def test_help_takes_a_blink():
    """0.3 s of CPU at most, in a process of its own: nothing heavy is imported to explain the commands."""
    code = ("import sys, time; sys.argv = ['hf-immunize', '--help']\nfrom hf_immunize.cli import app\n"
            "try:\n    app()\nexcept SystemExit:\n    pass\n"
            "heavy = {'torch', 'transformers', 'diffusers', 'huggingface_hub', 'pydantic', 'PIL'} & set(sys.modules)\n"
            "print('heavy', sorted(heavy), file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "immunize" in done.stdout and "heavy []" in done.stderr
