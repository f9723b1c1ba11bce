"""What the gate asks when nobody says anything, and the three ready policies. Synthetic exams: no claim."""

import dataclasses
import shutil

import pytest
import torch
from preset_exam import preset_exam, without_references
from published import certified, release_grade
from safetensors.torch import save

from hf_immunize.attacks import ATTACKS
from hf_immunize.errors import ConfigError, PolicyUnmetError, PublishRefusedError
from hf_immunize.exam import PROTOCOLS
from hf_immunize.hub import Policy, verify_folder
from hf_immunize.hub.policy import NEEDS_BASE, NOTHING, POLICIES, PUBLISHING
from hf_immunize.hub.release import prepare
from hf_immunize.records import Certificate


def unmet(folder, policy):
    policy = dataclasses.replace(policy, rejudged=False)  # these synthetic figures follow from no traces
    return [item.message for item in verify_folder(folder, policy=policy).findings if item.level == "policy"]


def change(folder, **fields):
    certificate = Certificate.read(folder / "certificate.json")
    certificate.model_copy(update=fields).write(folder / "certificate.json")


@pytest.fixture(scope="module", params=[True, False], ids=["CNN", "ViT"])
def standard(request, tmp_path_factory):
    """A standard exam that a network with or without batch normalisation withstands by formula."""
    weights = save({"weight": torch.ones(2)} | ({"norm.running_mean": torch.zeros(2)} if request.param else {}))
    skipped = [*NEEDS_BASE, *(() if request.param else ("batchnorm_probe",))]
    return preset_exam(tmp_path_factory.mktemp("whole"), PROTOCOLS["standard"], breaks=(), skipped=skipped,
                       weights=weights)


def test_the_default_is_release_and_of_a_network_with_or_without_batch_norm_it_asks_the_same(tmp_path, standard):
    assert Policy() == POLICIES["release"] == PUBLISHING
    assert prepare(standard).verification.ok
    folder = without_references(shutil.copytree(standard, tmp_path / "without"))
    with pytest.raises(PolicyUnmetError) as told:
        prepare(folder)
    lines = [line for line in str(told.value).splitlines() if line.startswith("  ")]
    assert len(lines) == 1 and "attackers without the model are missing" in lines[0]
    change(folder, overall="RESISTS")
    with pytest.raises(PublishRefusedError, match="its overall verdict is written RESISTS, judged NOT RUN"):
        prepare(folder)


def test_what_is_set_aside_excuses_no_missing_attackers_without_the_model(tmp_path):
    """An attack of who holds the base FAILS and is set aside: then the overall verdict is FAILS for two reasons."""
    folder = preset_exam(tmp_path, PROTOCOLS["standard"], breaks=NEEDS_BASE, skipped=())
    assert verify_folder(folder, policy=Policy()).ok
    found = verify_folder(without_references(folder), policy=Policy())
    assert [item.message for item in found.findings if item.level == "policy"] == [
        "the policy asks for RESISTS overall, the certificate says FAILS, although every attack was held off: utility, "
        "trainability or attackers without the model are missing."]


def test_an_exam_that_is_not_the_standard_one_is_not_released_but_may_be_shown(tmp_path):
    folder = certified(tmp_path)
    asked = dataclasses.replace(Policy(), rejudged=False)
    with pytest.raises(PolicyUnmetError, match=r"(?s)the certificate is of 'quick'.*every attack of the exam 'standard'"
                       ".*5 seeds.*trainability"):
        prepare(folder, policy=asked)
    with pytest.raises(PublishRefusedError, match="its field 'judged_by' is missing"):
        prepare(folder)
    shown = dataclasses.replace(POLICIES["research"], rejudged=False)
    assert prepare(folder, policy=shown).verification.ok


def test_that_an_attack_does_not_apply_is_read_off_the_weights_and_not_believed(tmp_path):
    folder = release_grade(tmp_path, verdicts={"batchnorm_probe": "NOT APPLICABLE", "lora": "NOT APPLICABLE"})
    assert unmet(folder, Policy()) == [
        "the policy asks for every attack of the exam 'standard', not run: batchnorm_probe, lora."]


@pytest.mark.parametrize("verdict", ["INCONCLUSIVE", "NOT RUN", "FAILS"])
def test_a_starved_attack_looks_no_better_than_a_failed_one(tmp_path, verdict):
    folder = release_grade(tmp_path, verdicts={"lora": verdict})
    assert any("the policy asks for RESISTS overall" in told and "lora" in told for told in unmet(folder, Policy()))
    named = dataclasses.replace(Policy(), undecided=("lora",), complete_exam=False, exam=None)
    assert bool(unmet(folder, named)) == (verdict == "FAILS")
    family = Policy(families={"family of lora": "RESISTS"})
    assert any("RESISTS against family of lora" in told or "not examined" in told for told in unmet(folder, family))


def test_who_holds_the_base_is_an_assumption_that_is_stated(tmp_path):
    assert set(NEEDS_BASE) == {name for name, attack in ATTACKS.items() if "base" in attack.needs}
    folder = release_grade(tmp_path, verdicts={"subtract_difference": "FAILS"})
    found = verify_folder(folder, policy=Policy(rejudged=False))
    assert found.ok and any(item.code == "assumption" and "subtract_difference" in item.message
                            for item in found.findings)
    assert any("FAILS for subtract_difference" in told for told in unmet(folder, Policy(attacker_holds_base=True)))


def test_nothing_to_protect_is_no_success(tmp_path):
    folder = release_grade(tmp_path)
    certificate = Certificate.read(folder / "certificate.json").model_copy(update={"overall": NOTHING})
    from hf_immunize.hub.findings import Findings
    from hf_immunize.hub.policy import Circumstances, judge

    findings = Findings()
    judge(Policy(), certificate, Circumstances(), findings)
    assert [NOTHING in item.message for item in findings.found if item.level == "policy"] == [True]


def test_trainability_utility_seeds_and_trust_are_asked_for_unless_said_otherwise(tmp_path):
    folder = release_grade(tmp_path)
    certificate = Certificate.read(folder / "certificate.json")
    change(folder, trainability=[])
    assert any("benign trainability" in told for told in unmet(folder, Policy()))
    assert not unmet(folder, Policy(trainable=False))
    drop = certificate.utility.drop.model_copy(update={"high": 5.1})
    change(folder, trainability=certificate.trainability,
           utility=certificate.utility.model_copy(update={"drop": drop}))
    assert any("primary drop of 5 points" in told for told in unmet(folder, Policy()))
    assert not unmet(folder, Policy(max_primary_drop=6.0))
    change(folder, utility=certificate.utility)
    assert any("6 seeds" in told for told in unmet(folder, Policy(min_seeds=6)))
    assert any("signed by a key you named" in told for told in unmet(folder, Policy(trust="signed")))


def test_strict_asks_for_more_than_release_does(tmp_path):
    told = unmet(release_grade(tmp_path), POLICIES["strict"])
    assert any("'thorough'" in line for line in told) and any("10 seeds" in line for line in told)
    assert any("a signature" in line for line in told)


def test_ready_policies_by_name_and_as_a_start(tmp_path):
    assert {name: Policy.read(name) for name in POLICIES} == POLICIES
    assert Policy.parse({"start_from": "research", "min_seeds": 3}) == dataclasses.replace(
        POLICIES["research"], min_seeds=3)
    with pytest.raises(ConfigError, match="expected one of research, release, strict or a policy in"):
        Policy.read(tmp_path / "none")
