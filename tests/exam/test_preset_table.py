"""The table of preset trials is that of the attacks, and tells honest runs from others."""

import json
from dataclasses import asdict

import pytest
from trace_builders import trace

from hf_immunize.attacks import ATTACKS, REFERENCES, parse_settings, plan_trials
from hf_immunize.attacks.core.presets import preset_trials
from hf_immunize.exam import PROTOCOLS
from hf_immunize.exam.presets import known_attack, preset_table, run_departures
from hf_immunize.records import Plan, PlannedAttack

NAME, PRESET = "full_finetune", PROTOCOLS["quick"]


def runs(**changes):
    configs = plan_trials(ATTACKS[NAME], parse_settings(PRESET.settings, ATTACKS).get(NAME), PRESET.trials)
    return {role: [trace([(1, 0.2), (60, 0.9)], attack=NAME, family=ATTACKS[NAME].family, role=role, seed=seed,
                         trial=trial, budget=120,
                         config=json.loads(json.dumps(asdict(config))) | {"attack_fraction": 0.8} | changes)
                   for config, trial in configs for seed in PRESET.seeds] for role in ("subject", "control")}


def references(name, **changes):
    configs = plan_trials(REFERENCES["pixel_network"], None, None)
    return [trace([(1, 0.2)], attack=name, role="nothing", seed=seed, trial=trial, budget=300,
                  config=json.loads(json.dumps(asdict(config))) | changes)
            for config, trial in configs for seed in PRESET.seeds]


def plan(**changes):
    about = PlannedAttack(attack=NAME, family=ATTACKS[NAME].family, unit=ATTACKS[NAME].unit)
    return Plan(protocol="quick", planned=list(PRESET.attacks), seeds=list(PRESET.seeds),
                settings=list(PRESET.settings), attacks=[about]).model_copy(update=changes)


def test_the_shipped_table_is_that_of_the_attacks():
    assert preset_table() == json.loads(json.dumps(preset_trials())), (
        "an attack or a preset changed: run python -m hf_immunize.attacks.core.presets")
    assert known_attack("lora") == (ATTACKS["lora"].family, "step") and known_attack("prayer") is None


def test_runs_as_the_preset_asks_for_them_do_not_depart():
    assert run_departures(plan(), runs()) == []
    about = PlannedAttack(attack="pixel_network", family="without the model", unit="step")
    other = [run.model_copy(update={"attack": name}) for run in references("pixel_network")
             for name in ("pixel_ridge", "hand_made_ridge")]
    made = {"nothing": [*references("pixel_network"), *other]}
    assert run_departures(plan(references=[about]), runs() | made) == []
    assert run_departures(plan(), runs() | {"nothing": other}) == ["no runs of pixel_network, which has no model"]
    assert run_departures(plan(), {}) == [], "what was not run says so in its cell"
    assert run_departures(plan(protocol="custom", threshold=0.5), runs(steps=1)) == []


@pytest.mark.parametrize("how, told", [
    ("a trial", "without the trial"), ("a seed", "on the subject without the seed 2"), ("settings", "other settings"),
    ("chosen seeds", "on the subject without the seed 5"), ("fewer rows", "on 10 % of each class, less than 80 %"),
    ("tuning", "compared on other seeds"), ("an invented reference", "is no attacker without the model"),
    ("a starved reference", "pixel_network learning_rate=0.001 with other settings"),
    ("half precision", "attackers with precision=bf16"), ("parts", "attackers with micro_batch_size=2"),
    ("threshold", "a threshold given by hand"), ("a side", "full_finetune on the control without the trial"),
])
def test_departures_are_named(how, told):
    made, about = runs(**({"steps": 10} if how == "settings" else {})), plan()
    if how == "a trial":
        first = made["subject"][0].trial
        made["subject"] = [run for run in made["subject"] if run.trial != first]
    elif how == "a seed":
        made["subject"] = [run for run in made["subject"] if run.seed != 2]
    elif how == "chosen seeds":
        made["subject"] += [run.model_copy(update={"seed": 40}) for run in made["subject"]]
    elif how == "fewer rows":
        made = runs(attack_fraction=0.1)
    elif how == "half precision":
        made["control"] = runs(precision="bf16")["control"]
    elif how == "parts":
        made = runs(micro_batch_size=2)
    elif how == "tuning":
        made = runs(tuning_seeds=[3])
    elif "reference" in how:
        name = "oracle" if "invented" in how else "pixel_network"
        about = plan(references=[PlannedAttack(attack=name, family="without the model", unit="step")])
        made["nothing"] = references(name, steps=1)
        made["nothing"] += [run.model_copy(update={"attack": other}) for run in made["nothing"][:1]
                            for other in ("pixel_ridge", "hand_made_ridge", "pixel_network") if other != name]
    elif how == "a side":
        made["control"] = []
    elif how == "threshold":
        about = plan(threshold=0.5)
    assert told in run_departures(about, made)[0]
