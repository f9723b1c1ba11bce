"""The plan in a certificate: what the preset asks for, and what was run of it."""

import pytest
from trace_builders import side_of

from hf_immunize.attacks import ATTACKS, TRAINABILITY
from hf_immunize.certification.planning import plan_differences, plan_exam
from hf_immunize.exam import PROTOCOLS, Protocol


def plan_of(protocol):
    traces = {"subject": side_of("subject", (5, 5), config={"tuning_seeds": [0]}), "control": side_of("control", (5,))}
    return plan_exam(protocol, ATTACKS, TRAINABILITY, traces)


def standard():
    return plan_of(PROTOCOLS["standard"]).model_copy(update={"protocol": "standard"})


def test_a_plan_tells_what_was_asked_for_and_what_was_run():
    plan = plan_of(PROTOCOLS["standard"])
    assert plan.protocol == "custom", "two seeds of one trial are not the standard exam"
    plan = standard()
    assert plan_differences(plan) == [] and plan.seeds == [0, 1, 2, 3, 4] and plan.tuning_seeds == 1
    lora = next(item for item in plan.attacks if item.attack == "lora")
    assert (lora.seeds, lora.trials, lora.budget, lora.tuning_seeds) == ([0, 1], ["learning_rate=0.1"], 1000, [0])
    ridge = next(item for item in plan.attacks if item.attack == "ridge_probe")
    assert (ridge.seeds, ridge.unit, ridge.family) == ([], "solve", ATTACKS["ridge_probe"].family)


@pytest.mark.parametrize("changes, named", [
    ({"planned": ["lora"]}, ["planned"]), ({"seeds": [0]}, ["seeds"]), ({"settings": []}, ["settings"]),
    ({"trials": 1}, ["trials"]), ({"tuning_seeds": None}, ["tuning_seeds"]), ({"attacks": []}, ["attacks"]),
    ({"trainability": []}, ["trainability"]), ({"protocol": "mine"}, ["protocol"]),
])
def test_a_plan_that_is_not_the_presets_is_told_by_its_field(changes, named):
    assert plan_differences(standard().model_copy(update=changes)) == named


def test_an_attack_beyond_the_preset_is_in_the_plan():
    plan = plan_of(Protocol(attacks=("ridge_probe",), seeds=(0,)))
    assert {item.attack for item in plan.attacks} == {"ridge_probe", "lora"} and plan.planned == ["ridge_probe"]
