"""One verb for every family: which options mean which task, what is refused, and in which words."""

from __future__ import annotations

import pytest

from hf_immunize.data import TaskArguments
from hf_immunize.diffusion.prompts import PromptArguments
from hf_immunize.diffusion.tasks import ConceptArguments
from hf_immunize.errors import ConfigError
from hf_immunize.stages.attack import AttackOptions, AttackPlan
from hf_immunize.stages.attack import main as attack
from hf_immunize.stages.base import ImmunizeOptions
from hf_immunize.stages.certify import CertifyOptions
from hf_immunize.stages.pretrain import main as pretrain
from hf_immunize.stages.start import start
from hf_immunize.stages.words import choose_family, read_words, refuse_foreign
from hf_immunize.tasks import FAMILIES, family_of, find_family

PROMPTS = ["--retain_images=a", "--harmful_images=b", "--retain_prompt=a photo", "--harmful_prompt=a sks"]


@pytest.mark.parametrize(
    ("words", "name", "kind"),
    [(["--primary_dataset=a", "--harmful_dataset", "b"], "classes", TaskArguments),
     (["--dataset", "builder:digits"], "concepts", ConceptArguments), (PROMPTS, "prompts", PromptArguments)],
)  # fmt: skip
def test_the_options_name_the_family_as_flags_or_in_a_file(words, name, kind, tmp_path):
    assert choose_family(words)[0].name == name
    task, options = read_words(lambda _: (AttackOptions,), [*words, "--model-path=m"], "doc")
    assert isinstance(task, kind) and family_of(task).name == name and options.model_path == "m"
    pairs = [word.removeprefix("--").split("=", 1) for word in words if "=" in word] or [["dataset", "builder:digits"]]
    (tmp_path / "task.yaml").write_text("".join(f"{key}: {value}\n" for key, value in pairs))
    assert choose_family(["--config", str(tmp_path / "task.yaml")])[0].name == name


def test_a_family_by_name_goes_before_what_the_options_say():
    assert choose_family(["--family", "prompts", "--dataset=a"]) == (FAMILIES["prompts"], ["--dataset=a"])
    assert choose_family(["--family=concepts"])[0].name == "concepts" and choose_family([])[0].name == "classes"
    with pytest.raises(ConfigError, match="expected the options of one task, got .*'classes'.*'prompts'"):
        choose_family([*PROMPTS, "--primary_dataset=a"])
    with pytest.raises(ConfigError, match="expected a family of tasks in"):
        find_family((), "poems")
    with pytest.raises(ConfigError, match="expected TaskArguments, ConceptArguments or PromptArguments, got dict"):
        family_of({})


@pytest.mark.parametrize(
    ("options", "family", "message"),
    [(AttackOptions("m", feature_module="head"), "concepts", "no feature_module for a pipeline, got 'head'"),
     (AttackOptions("m", pictures=2), "classes", "no pictures for a classifier, got 2: it is an option of a pipeline"),
     (CertifyOptions("m", "b", judge_path="j"), "classes", "no judge_path for a classifier"),
     (ImmunizeOptions("b", from_scratch=True), "prompts", "no from_scratch for a pipeline, got True"),
     (ImmunizeOptions("b", trust_remote_code=True), "concepts", "no trust_remote_code for a pipeline")],
)  # fmt: skip
def test_options_of_the_other_kind_of_model_are_refused(options, family, message):
    with pytest.raises(ConfigError, match=message):
        refuse_foreign(options, FAMILIES[family])


def test_options_of_either_kind_are_fields_of_the_dataclass():
    for kind in (AttackOptions, CertifyOptions, ImmunizeOptions):
        assert set(kind.ONLY) <= set(kind.__dataclass_fields__)
        assert set(kind.ONLY.values()) <= {"classifier", "pipeline"}


def test_task_and_concept_are_one_option(tmp_path):
    words = ["--dataset=builder:digits", "--model_path=m"]
    (tmp_path / "benign.yaml").write_text("concept: benign\n")
    for more in (["--concept", "benign"], ["--task=benign"], ["--config", str(tmp_path / "benign.yaml")]):
        _, options = read_words(lambda _: (AttackOptions,), [*words, *more], "doc")
        assert options.task == "benign"
        assert AttackPlan.of(options, FAMILIES["concepts"]).names[0] == "benign_diffusion_lora"


def test_an_unknown_key_is_answered_with_the_nearest_known(tmp_path):
    (tmp_path / "a.yaml").write_text("tuning_seed: 1\n")
    with pytest.raises(ConfigError, match=r"unknown \['tuning_seed'\]: see --help. Did you mean tuning_seeds\?"):
        read_words(lambda _: (AttackOptions,), ["--config", str(tmp_path / "a.yaml")], "doc")


def test_the_plan_is_the_protocol_with_what_the_options_replace():
    plan = AttackPlan.of(AttackOptions("m"), FAMILIES["classes"])
    assert (plan.seeds, plan.trials, len(plan.names)) == ([0, 1, 2, 3, 4], None, 9) and plan.count() > 40
    plan = AttackPlan.of(AttackOptions("m"), FAMILIES["prompts"])
    assert (plan.trials, plan.tuning, plan.names[0]) == (4, 1, "diffusion_lora")
    plan = AttackPlan.of(AttackOptions("m", protocol="standard", attacks=["ridge_probe"], seeds=[7], trials=0,
                                       tuning_seeds=0), FAMILIES["classes"])
    assert (plan.names, plan.seeds, plan.trials, plan.tuning) == (["ridge_probe"], [7], None, None)
    with pytest.raises(ConfigError, match="expected a protocol in .*got 'quick'"):
        AttackPlan.of(AttackOptions("m", protocol="quick"), FAMILIES["prompts"])


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "", "cpu:x"])
def test_a_device_that_is_not_there_is_named(device):
    with pytest.raises(ConfigError, match="expected device among .*'cpu'.* on this machine, got "):
        start(device)


def test_attacks_are_described_for_each_kind_of_model(capsys):
    attack(["--describe"])
    assert "lora.rank=8" in capsys.readouterr().out
    attack(["--describe", "--family", "concepts"])
    shown = capsys.readouterr().out
    assert "diffusion_lora.rank" in shown and "benign_diffusion_lora" in shown and "ridge_probe" not in shown


def test_a_pipeline_that_reads_prompts_is_not_pretrained():
    with pytest.raises(ConfigError, match="expected a task of classes or concepts to pretrain on"):
        pretrain(PROMPTS)


def test_names_of_classes_stay_names(tmp_path):
    """YAML 1.1 reads 010 as 8 and 1:30 as 90."""
    from hf_immunize.options import read_yaml

    text = "harmful_labels: [010, 011, 1:30]\nseeds: [0, 12, -3, 0x1F, 1_000]\nstrength: 1.5\n"
    (tmp_path / "o.yaml").write_text(text)
    assert read_yaml(tmp_path / "o.yaml") == {
        "harmful_labels": ["010", "011", "1:30"], "seeds": [0, 12, -3, 31, 1000], "strength": 1.5}
