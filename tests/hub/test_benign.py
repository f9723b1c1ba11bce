"""Benign trainability as publishers and downloaders see it: in the policy, among the traces, judged again."""

import dataclasses

import pytest
import record_builders as build
from published import asking, certified
from rejudged import judge_again
from trace_builders import data, reaching

from hf_immunize.hub import Policy, verify_folder
from hf_immunize.records import Certificate

NAMES = ("benign_probe", "benign_lora", "benign_full_finetune")
STEPPED = [dataclasses.replace(attack, diverged=0) for attack in build.ATTACKS if attack.verdict == "RESISTS"]


@pytest.fixture
def learned(tmp_path):
    """A certificate that follows from its traces, benign ones among them."""
    folder = certified(tmp_path, "learned", STEPPED)
    certificate = Certificate.read(folder / "certificate.json")
    for role, model in (("subject", certificate.subject), ("control", certificate.control)):
        for name in NAMES:
            for seed in (0, 1, 2):
                run = reaching(5, attack=name, family="benign trainability", role=role, seed=seed, model=model)
                run.write(folder / "traces" / role / run.file_name)
    judge_again(folder, build.plan_of(STEPPED, NAMES), benign_data=data())
    return folder


def change(folder, **fields):
    certificate = Certificate.read(folder / "certificate.json")
    certificate.model_copy(update=fields).write(folder / "certificate.json")


def failed(folder, **options):
    return [item.message for item in verify_folder(folder, **options).findings if item.level != "note"]


def test_benign_runs_are_evidence_and_judged_again(learned):
    assert failed(learned, rejudge=True) == []
    bent = [item.model_copy(update={"verdict": "INCONCLUSIVE"})
            for item in Certificate.read(learned / "certificate.json").trainability]
    change(learned, trainability=bent)
    assert any("benign trainability is not what its traces give" in told for told in failed(learned, rejudge=True))


def test_a_policy_may_ask_for_it(learned):
    policy = asking(trainable=True)
    assert not any("benign trainability" in told for told in failed(learned, policy=policy))
    found = Certificate.read(learned / "certificate.json").trainability
    change(learned, trainability=[found[0].model_copy(update={"verdict": "WORSE"}), *found[1:]])
    assert any("not shown for benign_probe" in told for told in failed(learned, policy=policy))
    assert Policy.parse({"trainable": True}).trainable


def test_a_policy_that_asks_for_it_refuses_an_exam_without(tmp_path):
    told = failed(certified(tmp_path), policy=asking(trainable=True))
    assert any("benign trainability, not shown for any method" in message for message in told)
