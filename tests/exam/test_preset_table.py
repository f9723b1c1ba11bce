"""The table of preset trials is that of the attacks, and tells honest runs from others."""

import json
from dataclasses import asdict

import pytest
from trace_builders import trace

from hf_immunize.attacks import ATTACKS, parse_settings, plan_trials
from hf_immunize.attacks.core.presets import preset_trials
from hf_immunize.exam import PROTOCOLS
from hf_immunize.exam.presets import known_attack, preset_table, run_departures
from hf_immunize.records import Plan, PlannedAttack

NAME, PRESET = "full_finetune", PROTOCOLS["quick"]


def runs(**changes):
    configs = plan_trials(ATTACKS[NAME], parse_settings(PRESET.settings, ATTACKS).get(NAME), PRESET.trials)
    return {role: [trace([(1, 0.2), (60, 0.9)], attack=NAME, family=ATTACKS[NAME].family, role=role, seed=seed,
                         trial=trial, budget=120,
                         config=json.loads(json.dumps(asdict(config))) | {"attack_fraction": 0.5} | changes)
                   for config, trial in configs for seed in PRESET.seeds] for role in ("subject", "control")}


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
    assert run_departures(plan(), {}) == [], "what was not run says so in its cell"
    assert run_departures(plan(protocol="custom", threshold=0.5), runs(steps=1)) == []


@pytest.mark.parametrize("how, told", [
    ("a trial", "without the trial"), ("a seed", "on the subject without the seed 2"), ("settings", "other settings"),
    ("threshold", "a threshold given by hand"), ("a side", "full_finetune on the control without the trial"),
])
def test_departures_are_named(how, told):
    made, about = runs(**({"steps": 10} if how == "settings" else {})), plan()
    if how == "a trial":
        first = made["subject"][0].trial
        made["subject"] = [run for run in made["subject"] if run.trial != first]
    elif how == "a seed":
        made["subject"] = [run for run in made["subject"] if run.seed != 2]
    elif how == "a side":
        made["control"] = []
    elif how == "threshold":
        about = plan(threshold=0.5)
    assert told in run_departures(about, made)[0]
