"""Run files: what they hold, what they mean, and what is refused with the nearest known name."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hf_immunize.errors import ConfigError
from hf_immunize.stages.workflow.run_file import RunFile
from hf_immunize.stages.workflow.stages import choose, depending, make_stages

TASK = "task: {primary_dataset: a, harmful_dataset: b}\n"
LEAST = TASK + "base: model\nimmunize: {one: {objective: ill_only}}\n"


def read(folder, text):
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return RunFile.read(path)


def test_the_stages_of_one_model_and_what_each_needs(tmp_path):
    stages = make_stages(read(tmp_path, LEAST))
    assert {name: (stage.verb, stage.needs) for name, stage in stages.items()} == {
        "base": ("fetch", ()), "one": ("immunize", ("base",)), "attack-base": ("attack", ("base",)),
        "attack-one": ("attack", ("one",)),
        "certify-one": ("certify", ("base", "one", "attack-base", "attack-one")),
        "report": ("report", ("certify-one",)),
    }
    assert stages["one"].options == {
        "primary_dataset": "a", "harmful_dataset": "b", "objective": "ill_only", "base_path": str(tmp_path / "base"),
        "output_dir": str(tmp_path / "one"),
    }
    assert stages["attack-one"].after == ("attack-base",), "its effort follows that of the base"
    assert stages["attack-one"].options["control_path"] == str(tmp_path / "base")
    assert stages["attack-base"].options["role"] == "control" and stages["attack-one"].options["role"] == "subject"
    assert stages["report"].options["model_paths"] == [str(tmp_path / "one")]


def test_a_base_may_start_from_a_public_model_of_the_same_run(tmp_path):
    text = TASK + "public: {primary_split: all}\npretrain: {seed: 1}\nimmunize: {one: {objective: ill_only}}\n"
    stages = make_stages(read(tmp_path, text))
    assert (stages["public"].verb, stages["public"].needs, stages["public"].makes_model) == ("pretrain", (), True)
    assert stages["public"].options["primary_split"] == "all" and stages["public"].folder == tmp_path / "public"
    assert stages["base"].needs == ("public",) and "primary_split" not in stages["base"].options
    assert stages["base"].options["model_name_or_path"] == str(tmp_path / "public")
    with pytest.raises(ConfigError, match="expected public only with pretrain"):
        read(tmp_path, LEAST + "public: {seed: 1}\n")


def test_every_section_and_what_it_starts_from(tmp_path):
    (tmp_path / "shared.yaml").write_text("device: cpu\nsettings: [lora.steps=2]\nmodel_path: elsewhere\n")
    (tmp_path / "judging.yaml").write_text("judge_path: of the single stage\nprotocol: standard\n")
    run = read(tmp_path, TASK + "pretrain: {model_name_or_path: m}\njudge: {primary_dataset: c}\noutput_dir: out\n"
               "immunize: {one: {objective: ill_only}, there: }\nattack: {config: shared.yaml, protocol: quick}\n"
               "benign: {trials: 3}\nscratch: {attacks: [lora]}\ncertify: {config: [judging.yaml]}\n"
               "report: {output: page.html}\njobs: 3\nhardware: gpu.yaml\n")
    stages = make_stages(run)
    assert (run.jobs, run.hardware) == (3, "gpu.yaml")
    assert list(stages) == ["base", "judge", "one", "attack-base", "benign-base", "attack-scratch", "attack-one",
                            "benign-one", "certify-one", "attack-there", "benign-there", "certify-there", "report"]
    assert stages["base"].verb == "pretrain" and stages["judge"].options == {
        "primary_dataset": "c", "output_dir": "out/judge"}
    assert stages["attack-one"].options["model_path"] == "out/one", "the run goes before an option file"
    benign = stages["benign-base"].options
    assert benign["task"] == "benign" and benign["protocol"] == "quick" and benign["trials"] == 3
    assert "settings" not in benign, "those of the harmful attacks have other names"
    assert stages["attack-scratch"].options["attacks"] == ["lora"]
    assert stages["attack-scratch"].options["settings"] == ["lora.steps=2"]
    judged = stages["certify-one"].options
    assert judged["judge_path"] == "out/judge" and judged["protocol"] == "standard"
    assert stages["attack-there"].needs == () and "there" not in stages
    assert stages["report"].options["output"] == "page.html"
    assert choose(stages, ["benign-one", "certify"]) == ["benign-one", "certify-one", "certify-there"]
    assert depending(stages, ["one"]) == ["one", "attack-one", "benign-one", "certify-one", "report"]
    with pytest.raises(ConfigError, match=r"got 'atack-one'. Did you mean attack-one\?"):
        choose(stages, ["atack-one"])


def test_a_base_in_the_runs_own_folder_is_not_fetched(tmp_path):
    (tmp_path / "base").mkdir()
    text = TASK + f"base: {tmp_path / 'base'}\nimmunize: {{one: {{objective: ill_only}}}}\n"
    stages = make_stages(read(tmp_path, text))
    assert "base" not in stages and stages["one"].needs == ()
    assert stages["one"].options["base_path"] == str(tmp_path / "base")


@pytest.mark.parametrize(("text", "message"), [
    ("", "expected a section task with the data in .*run.yaml, got none"),
    ("- a\n", "expected option: value pairs in .*run.yaml, got list"),
    ("task: [\n", "expected a readable YAML file, got .*run.yaml"),
    ("\tx: 1\n", "expected a readable YAML file"),
    ("a: !!python/object:os.system x\n", "expected a readable YAML file"),
    (TASK + "task: {dataset: a}\n", "got 'task' twice in what begins in line 1"),
    (LEAST + "imunize: 1\n", r"got unknown \['imunize'\]. Did you mean immunize\?"),
    (LEAST.replace("base: model\n", ""), "got neither: add one"),
    (LEAST + "pretrain: {max_steps: 1}\n", "got both: remove"),
    (TASK + "base: model\n", "expected in section immunize of .* a name for each immunized model"),
    (TASK + "base: m\nimmunize: {objective: ill_only}\n", "put a name for the model between immunize and its options"),
    (TASK + "base: m\nimmunize: {a/b: {}}\n", "expected names of letters"),
    (TASK + "base: m\nimmunize: {../up: {}}\n", "expected names of letters"),
    (TASK + "base: m\nimmunize: {base: {}}\n", "expected another name than 'base'"),
    (TASK + "base: m\nimmunize: {1: {}}\n", "expected names of letters"),
    (TASK + "base: [m]\nimmunize: {a: {}}\n", r"expected text for base in .*, got \['m'\]"),
    (LEAST + "jobs: many\n", "expected a whole number from 1 on for jobs"),
    (LEAST + "jobs: 0\n", "expected a whole number from 1 on for jobs"),
    (LEAST + "jobs: true\n", "expected a whole number from 1 on for jobs"),
    (LEAST + "attack: quick\n", "expected options with values in section attack of .*, got 'quick'"),
    (LEAST + "attack: {1: 2}\n", "expected names of options in section attack"),
    (LEAST + "attack: {config: nowhere.yaml}\n", "expected the option file 'nowhere.yaml' that config of section "
                                                 "attack"),
    (LEAST + "attack: {config: 3}\n", "expected the option file"),
    (LEAST.replace("base: model", "pretrain: {}\nbase_revision: v1"), "expected base_revision only with base"),
])  # fmt: skip
def test_what_is_no_run_file_is_said_with_file_and_remedy(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as told:
        read(tmp_path, text)
    assert "run.yaml" in str(told.value)


@pytest.mark.parametrize(("section", "option"), [("attack", "role"), ("certify", "base_path"), ("benign", "model_path"),
                                                 ("report", "model_paths")])
def test_places_are_the_runs(tmp_path, section, option):
    with pytest.raises(ConfigError, match=f"expected no {option} in section {section} of .*run.yaml, got one"):
        make_stages(read(tmp_path, LEAST + f"{section}: {{{option}: x}}\n"))


def test_a_folder_in_the_place_of_a_run_file(tmp_path):
    with pytest.raises(ConfigError, match="got the folder .*: name the YAML in it"):
        RunFile.read(tmp_path)
    with pytest.raises(ConfigError, match="expected a readable YAML file, got .*none.yaml: FileNotFoundError"):
        RunFile.read(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError, match="expected a readable YAML file, got .*binary.yaml: UnicodeDecodeError"):
        RunFile.read(tmp_path / "binary.yaml")


def test_classifiers_need_no_diffusers(tmp_path):
    """The plain install has none: every module of the way from init to a result is imported without it."""
    code = ("import sys; sys.modules['diffusers'] = None\nfrom importlib import import_module\n"
            f"for name in {WAY}: import_module('hf_immunize.stages.' + name)\n"
            "import hf_immunize; hf_immunize.Exam, hf_immunize.immunize, hf_immunize.ImmunizationTrainer\n"
            "from hf_immunize.tasks import find_family; from hf_immunize.stages.checks.options import kinds_of\n"
            "from hf_immunize.stages.workflow.run_file import RunFile\n"
            "from hf_immunize.stages.workflow.stages import make_stages\n"
            "stages = make_stages(RunFile.read(sys.argv[1]))\n"
            "print([len(kinds_of(stage, find_family(stage.options))) for stage in stages.values()])")
    (tmp_path / "run.yaml").write_text(LEAST)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run.yaml")], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "[1, 3, 2, 2, 2, 1]", done.stderr


WAY = ["init", "plan", "run", "fetch", "immunize", "pretrain", "pretrain_classifier", "immunize_classifier", "attack",
       "certify", "report", "cards", "checks.model", "checks.rows", "checks.options", "workflow.draft_classifier",
       "workflow.draft_pipeline", "api.exam", "api.immunizing", "api.trainer", "api.result"]
