"""Which stages are run again after what, on stages that only write files: kills, edits, locks and failures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import record_builders as build

from hf_immunize.errors import ConfigError, RecordError, RunMismatchError, StageError
from hf_immunize.records import Certificate
from hf_immunize.stages import run as run_stage
from hf_immunize.stages.run import RunOptions, run_file
from hf_immunize.stages.workflow.display import last_line
from hf_immunize.stages.workflow.launch import Launcher, threads_beside
from hf_immunize.stages.workflow.live import ProgressPage
from hf_immunize.stages.workflow.run_file import RunFile
from hf_immunize.stages.workflow.stages import Stage, make_stages
from hf_immunize.stages.workflow.state import Lock, State

FAKE = Path(__file__).parent / "fake_stage.py"
ALL = ["base", "one", "two", "attack-base", "attack-one", "certify-one", "attack-two", "certify-two", "report"]


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A run file of stages that take no time; ``made`` counts how often each was started."""
    (tmp_path / "data.csv").write_text("image,label\n")
    text = (f"task: {{primary_dataset: {tmp_path / 'data.csv'}, harmful_dataset: b}}\npretrain: {{max_steps: 1}}\n"
            "immunize: {one: {strength: 1}, two: {strength: 2}}\nattack: {seeds: [0]}\n")
    (tmp_path / "run.yaml").write_text(text)
    monkeypatch.setattr(Launcher, "words", lambda self, stage, options: [
        sys.executable, "-S", str(FAKE), stage.kind, stage.name, str(options), str(stage.folder)])
    monkeypatch.setattr(run_stage, "_check_options", lambda run, stale: None)
    return tmp_path


def edit(job, before, after):
    text = (job / "run.yaml").read_text()
    assert before in text
    (job / "run.yaml").write_text(text.replace(before, after))


def made(job, **options):
    """The stages that were started, in order."""
    log = job / "started"
    log.unlink(missing_ok=True)
    run_file(job / "run.yaml", RunOptions(**options))
    return log.read_text().split() if log.exists() else []


def test_everything_once_and_then_nothing(job, capsys):
    assert sorted(made(job)) == sorted(ALL)
    assert made(job) == []
    assert "done before, unchanged" in capsys.readouterr().out


def test_side_by_side_what_most_others_wait_for_begins_first(job, monkeypatch):
    """Every exam follows that of the base; one after the other, stages keep the order of the run file."""
    begun, start = [], Launcher.start
    monkeypatch.setattr(Launcher, "start", lambda self, stage, *rest: begun.append(stage.name) or start(
        self, stage, *rest))
    made(job, jobs=2)
    assert begun[:3] == ["base", "attack-base", "one"] and sorted(begun) == sorted(ALL)
    begun.clear()
    made(job, jobs=1, again=["base"])
    assert begun[:4] == ["base", "one", "two", "attack-base"]


def test_one_option_runs_only_what_depends_on_it_and_says_so_before(job, capsys):
    made(job)
    edit(job, "strength: 2", "strength: 3")
    assert run_file(job / "run.yaml", RunOptions(dry_run=True)) == {
        "two": "strength 2 -> 3", "attack-two": "after two", "certify-two": "after two, attack-two",
        "report": "after certify-two"}
    capsys.readouterr()
    assert made(job) == ["two", "attack-two", "certify-two", "report"]
    told = capsys.readouterr().out
    assert told.index("two runs again: strength 2 -> 3") < told.index("two …")
    (kept,) = (job / "replaced").glob("two-*")
    assert json.loads((kept / "run.json").read_text())["files"] and (kept / "traces" / "subject").is_dir()
    assert made(job) == []


def test_a_side_of_the_task_that_a_stage_does_not_read_leaves_it_as_it_is(job):
    """A harmless task that is added at the end trains no base again, nor do other splits of the harmful one."""
    made(job)
    (job / "benign.csv").write_text("image,label\n")
    edit(job, "harmful_dataset: b", f"harmful_dataset: b, benign_dataset: {job / 'benign.csv'}")
    assert not {"base", "one", "two"} & set(made(job))
    (job / "benign.csv").write_text("image,label\na.png,0\n")
    assert not {"base", "one", "two"} & set(made(job))
    edit(job, "harmful_dataset: b", "harmful_dataset: b, harmful_splits: 'defense=0.4,attack=0.3,test=0.3'")
    started = made(job)
    assert "base" not in started and {"one", "two"} <= set(started)
    edit(job, "harmful_dataset: b", "harmful_dataset: b, primary_labels: '0,1'")
    assert "base" in made(job)


def test_a_stage_that_comes_out_as_before_starts_nothing_after_it(job):
    made(job)
    edit(job, "max_steps: 1", "max_steps: 1, seed: 0")  # the fake base does not depend on its options
    assert made(job) == ["base", "attack-base", "certify-one", "certify-two", "report"], "traces went with the folder"


def test_changed_data_counts_by_content_and_not_by_time(job):
    made(job)
    os.utime(job / "data.csv", (1, 1))
    assert made(job) == []
    (job / "data.csv").write_text("image,label\na.png,0\n")
    assert sorted(made(job)) == sorted(ALL)


def test_what_was_changed_by_hand_is_made_again(job):
    made(job)
    (job / "one" / "certificate.json").write_text("forged")
    assert made(job)[0] == "certify-one"
    (job / "two" / "traces" / "subject" / "lora__a__seed0.json").unlink()
    assert made(job)[0] == "attack-two"


def test_from_and_stage(job):
    with pytest.raises(ConfigError, match="expected base to be done for the stage one, got: not run yet. Run it too"):
        made(job, stage=["one"])
    assert made(job, stage=["base", "one"]) == ["base", "one"]
    assert sorted(made(job)) == sorted(set(ALL) - {"base", "one"})
    assert made(job, again=["certify-two"]) == ["certify-two", "report"]
    assert made(job, again=["one"], stage=["one"]) == ["one"]
    assert made(job, stage=["immunize"]) == []


def test_a_run_folder_that_was_moved_is_the_same_run(job, tmp_path_factory):
    made(job)
    other = tmp_path_factory.mktemp("elsewhere") / "job"
    job.rename(other)
    (other / "run.yaml").write_text((other / "run.yaml").read_text().replace(str(job), str(other)))
    assert run_file(other / "run.yaml", RunOptions(dry_run=True)) == {}


def test_a_failing_stage_shows_the_end_of_its_log_and_the_rest_goes_on_next_time(job):
    (job / "fail").write_text("attack-one")
    with pytest.raises(StageError, match=r"stage attack-one to end well, got one that left with exit code 3(.|\n)*why"):
        run_file(job / "run.yaml")
    (job / "fail").unlink()
    assert "attack-one" in made(job) and "base" not in made(job)


def test_a_stage_that_leaves_nothing_is_no_success(job):
    (job / "empty").write_text("certify-one")
    with pytest.raises(RecordError, match="expected .*certificate.json.* of the stage certify-one, got no such file"):
        run_file(job / "run.yaml")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_killed_goes_on_where_it_stopped(job, number):
    """The killed run's stage is waited for, or told about; what was interrupted is continued in what it left."""
    (job / "slow").write_text("attack-base")
    code = ("import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # in a background job it is off
            f"import sys; sys.path.insert(0, {str(FAKE.parent)!r}); import fake_stage, pathlib; "
            f"fake_stage.run_fakes(pathlib.Path({str(job / 'run.yaml')!r}))")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(job / "at-work")
    process.send_signal(number)
    process.wait(30)
    started = int((job / "at-work").read_text())
    if number == signal.SIGKILL:
        with pytest.raises(RunMismatchError, match=f"got one at work .process {process.pid} with attack-base"):
            run_file(job / "run.yaml")
        os.kill(started, signal.SIGKILL)
    wait_until(lambda: not alive(started))
    (job / "slow").unlink()
    stages = make_stages(RunFile.read(job / "run.yaml"))
    state = State(RunFile.read(job / "run.yaml"))
    assert state.why_stale(stages["attack-base"], stages) == "was interrupted"
    again = made(job)
    assert again[0] in ("one", "attack-base") and "base" not in again and "attack-base" in again
    assert not (job / "replaced").exists(), "an interrupted stage goes on in its own results"


def wait_for(path):
    wait_until(lambda: path.exists() and path.read_text())


def wait_until(true):
    for _ in range(600):
        if true():
            return
        time.sleep(0.05)
    raise AssertionError("waited for 30 s")


def alive(number):
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{number}/stat").read_text().split()[2] != "Z" if Path("/proc").exists() else True


def test_two_runs_in_one_folder(job):
    with Lock(job), pytest.raises(RunMismatchError, match=f"expected no other run in .*process {os.getpid()}"):
        run_file(job / "run.yaml")
    assert len(made(job)) == len(ALL)


def test_a_damaged_record_is_named(job):
    made(job)
    (job / "stages" / "run" / "one.json").write_text("{")
    with pytest.raises(RecordError, match="expected JSON in .*one.json.*delete the file"):
        run_file(job / "run.yaml")


def test_words_of_stages_alone_and_through_accelerate(tmp_path):
    (tmp_path / "run.yaml").write_text("task: {primary_dataset: a, harmful_dataset: b}\nbase: m\nimmunize: {one: {}}\n")
    stages = make_stages(RunFile.read(tmp_path / "run.yaml"))
    plain = [sys.executable, "-m", "hf_immunize.cli", "immunize", "--config", "o.yaml"]
    assert Launcher().words(stages["one"], Path("o.yaml")) == plain
    several = Launcher("gpu.yaml", 2)
    assert several.words(stages["one"], Path("o.yaml")) == [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", "gpu.yaml", "--num_processes", "2",
        "--module", "hf_immunize.cli", "immunize", "--config", "o.yaml"]
    attack = several.words(stages["attack-one"], Path("o.yaml"))
    assert attack[-4:] == ["hf_immunize.cli", "attack", "--config", "o.yaml"]
    assert "accelerate.commands.launch" in attack, "runs are shared"
    assert several.words(stages["certify-one"], Path("o.yaml"))[1:4] == ["-m", "hf_immunize.cli", "certify"]


@pytest.mark.parametrize(("told", "threads"), [("3", 3), ("", 4), ("0", 4), ("4,2", 4), (None, 4)])
def test_stages_have_the_threads_that_the_user_says_or_a_share_of_his_cores(monkeypatch, told, threads):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if told is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", told)
    assert threads_beside(2) == threads
    assert threads_beside(100) == (3 if told == "3" else 1)


@pytest.mark.parametrize(("name", "threads"), [("one", "2"), ("certify-one", "4")])
def test_processes_of_one_stage_share_its_threads(tmp_path, monkeypatch, name, threads):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "run.yaml").write_text("task: {primary_dataset: a, harmful_dataset: b}\nbase: m\nimmunize: {one: {}}\n")
    stage = make_stages(RunFile.read(tmp_path / "run.yaml"))[name]
    words = [sys.executable, "-c", "import os; print(os.environ['OMP_NUM_THREADS'])"]
    monkeypatch.setattr(Launcher, "words", lambda *_: words)
    assert Launcher(num_processes=2, jobs=2).start(stage, tmp_path / "o.yaml", tmp_path / "log").wait() == 0
    assert (tmp_path / "log").read_text().split()[-1] == threads


def test_a_hardware_file_that_is_not_there(job):
    with pytest.raises(ConfigError, match="expected an option file of accelerate launch, got 'none.yaml'"):
        run_file(job / "run.yaml", RunOptions(accelerate_config="none.yaml"))


def test_the_last_line_of_a_log_is_no_progress_bar(tmp_path):
    log = tmp_path / "log"
    log.write_text("well\n 50%|###   | 3/6 [00:01<00:01, 2.5it/s]\r100%|######| 6/6 [00:02<00:00, 2.5it/s]\n\n")
    assert last_line(log) == "well" and last_line(tmp_path / "none") == ""


def test_a_page_tells_how_far_the_run_is_after_each_stage(job, monkeypatch):
    seen = []
    tell = ProgressPage.tell
    monkeypatch.setattr(ProgressPage, "tell", lambda page, *told: (
        tell(page, *told), seen.append(page.path.read_text(encoding="utf-8"))))
    made(job)
    assert all('http-equiv="refresh"' in page and "at work" in page for page in seen)
    assert "base is made" in seen[-1] and "waits" in seen[0] and seen[0].count("waits") == len(ALL) - 1
    last = (job / "progress.html").read_text(encoding="utf-8")
    assert "refresh" not in last and f"{job.name}: ended" in last and all(name in last for name in ALL)
    (job / "fail").write_text("two")
    edit(job, "strength: 2", "strength: 3")
    with pytest.raises(StageError):
        run_file(job / "run.yaml")
    assert "stopped before its end" in (job / "progress.html").read_text(encoding="utf-8")


def test_the_page_shows_outcome_and_verdicts_that_are_there(tmp_path):
    folder = build.exam_folder(tmp_path / "run")
    stage = Stage("certify-m", "certify", {}, (), folder, "certify")
    with ProgressPage(tmp_path / "run", {"certify-m": stage}) as page:
        shown = page.path.read_text(encoding="utf-8")
    certificate = Certificate.read(folder / "certificate.json")
    assert f"<h2>{folder.name}</h2>" in shown and f"<b>{certificate.overall}</b>" in shown
    assert all(cell.attack in shown for cell in certificate.cells) and "<script" not in shown


def test_a_script_gets_plain_data_alone(job, capsys, monkeypatch, tmp_path_factory):
    certificate = Certificate.read(build.exam_folder(tmp_path_factory.mktemp("real")) / "certificate.json")
    monkeypatch.setattr(run_stage, "Certificate", SimpleNamespace(read=lambda path: certificate))
    run_stage.main([str(job / "run.yaml"), "--json"], prog="hf-immunize run")
    printed = capsys.readouterr()
    told = json.loads(printed.out)
    assert sorted(told["stages"]) == sorted(ALL) and told["output_dir"] == str(job)
    assert "base is made" in printed.err and set(told["models"]) == {"one", "two"}
    assert told["models"]["one"]["overall"] == certificate.overall and "lora" in told["models"]["one"]["cells"]
    run_stage.main([str(job / "run.yaml"), "--json", "--dry_run"], prog="hf-immunize run")
    assert json.loads(capsys.readouterr().out)["stages"] == {}


def test_the_same_run_by_another_path_is_the_same_run(job, monkeypatch):
    made(job)
    monkeypatch.chdir(job)
    log = job / "started"
    log.unlink(missing_ok=True)
    assert run_file(Path("run.yaml"), RunOptions(dry_run=True)) == {}
    edit(job, str(job / "data.csv"), "data.csv")
    assert run_file(Path("run.yaml"), RunOptions(dry_run=True)) == {}


def test_data_that_are_away_cost_nothing(job):
    made(job)
    kept = (job / "base" / "run.json").read_bytes()
    (job / "data.csv").rename(job / "away.csv")
    with pytest.raises(ConfigError, match=r"(?s)expected .*data.csv, which primary_dataset names.*Nothing was changed"):
        run_file(job / "run.yaml")
    assert (job / "base" / "run.json").read_bytes() == kept and not (job / "replaced").exists()
    (job / "away.csv").rename(job / "data.csv")
    assert made(job) == []


@pytest.mark.parametrize("place", ["a, b", "logs/x", "table"])
def test_data_are_watched_wherever_they_lie(job, place):
    folder = job.parent / f"data of {job.name}" / place
    folder.mkdir(parents=True)
    (folder / "one.png").write_bytes(b"1")
    (folder / "all.csv").write_text("file_name,label\none.png,0\n")
    (folder / "up").symlink_to(folder, target_is_directory=True)
    named = folder / "all.csv" if place == "table" else folder.parent if place.startswith("logs") else folder
    edit(job, "harmful_dataset: b", f"harmful_dataset: '{named}'")
    made(job)
    assert made(job) == []
    (folder / "one.png").write_bytes(b"2")
    assert {"one", "two"} <= set(made(job))


OWN_CODE = """
import json, sys
from pathlib import Path
from hf_immunize.stages.workflow.stages import Stage
from hf_immunize.stages.workflow.watched import sources_of
stages = [("immunize", {"objective": "ill_only+mine"}), ("attack", {"attacks": ["my_probe", "lora"]}),
          ("immunize", {"objective": "ill_only"}), ("attack", {"attacks": ["lora"]})]
print(json.dumps([sources_of(Stage("one", verb, told, (), Path("one"), "x"), {}) for verb, told in stages]))
"""


def test_a_stage_is_another_once_the_plug_in_that_it_names_was_edited(tmp_path):
    """An objective or an attack of one's own is known by its source; other stages do not depend on it."""
    code = tmp_path / "mine.py"
    text = ("import dataclasses\nfrom hf_immunize import Term, register_attack, register_objective\n"
            "from hf_immunize.attacks import ATTACKS\n"
            "register_objective('mine', Term('harmful_mine', 'harmful', lambda rows, _: rows.features.sum()))\n"
            "register_attack('my_probe', dataclasses.replace(ATTACKS['ridge_probe']))\n")

    def watched():
        done = subprocess.run(
            [sys.executable, "-c", OWN_CODE], capture_output=True, text=True, check=True,
            env={**os.environ, "HF_IMMUNIZE_PLUGINS": str(code), "PYTHONPATH": str(FAKE.parents[2])},
        )
        return json.loads(done.stdout)

    code.write_text(text)
    first = watched()
    assert [list(found) for found in first] == [["objective mine"], ["attack my_probe"], [], []]
    code.write_text(text.replace("features.sum()", "features.mean()"))
    assert [one != other for one, other in zip(first, watched(), strict=True)] == [True, True, False, False]
