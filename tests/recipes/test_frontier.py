"""The frontier's plan is one that its stages can read, and its table says what the cells say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import yaml
from trace_builders import reaching, trace

from hf_immunize.attacks import ATTACKS, TRAINABILITY, parse_settings
from hf_immunize.data import TaskArguments
from hf_immunize.options import make_options
from hf_immunize.stages.base import ImmunizeOptions
from hf_immunize.stages.immunize import config_of
from hf_immunize.tasks import FAMILIES
from hf_immunize.training import OBJECTIVES

ROOT = Path(__file__).parents[2]
PLANS = sorted((ROOT / "benchmarks").glob("frontier_*.yaml"))


@pytest.fixture(scope="module")
def frontier():
    spec = importlib.util.spec_from_file_location("frontier", ROOT / "benchmarks" / "frontier.py")
    made = importlib.util.module_from_spec(spec)
    sys.modules["frontier"] = made
    spec.loader.exec_module(made)
    return made


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_every_method_of_a_plan_can_be_read(path, tmp_path):
    plan = yaml.safe_load(path.read_text(encoding="utf-8"))
    make_options((TaskArguments,), plan["task"], "task")
    assert len(plan["methods"]) >= 5 and len(plan["defence_seeds"]) >= 3
    for options in plan["methods"].values():
        told = {**plan["shared"], **options, "base_path": "base", "output_dir": str(tmp_path), "report_to": "none"}
        _, args = make_options((ImmunizeOptions, config_of(FAMILIES["classes"])), told, "immunize")
        assert set(args.objectives) <= set(OBJECTIVES)
    assert set(plan["attack"]["attacks"]) <= set(ATTACKS)
    if search := plan.get("search"):  # else its settings are in the plan
        assert set(search["first"]) == set(search["ranges"]) and search["trials"] > 1
    else:
        assert {"learning_rate", "strength"} <= set(plan["shared"])
    for stages in plan.get("pretraining", {}).values():
        assert all(stage["after"] in plan["pretraining"] if "after" in stage else stage["stage"] for stage in stages)
    parse_settings(plan["attack"]["settings"], ATTACKS)
    if "benign" in plan:
        assert plan["task"]["benign_labels"] and set(plan["benign"]["attacks"]) <= set(TRAINABILITY)
        parse_settings(plan["benign"]["settings"], TRAINABILITY)


def test_a_cell_is_the_ratio_of_mean_curves_and_a_bound_where_the_budget_ends(frontier):
    def runs(steps, **changes):
        return [reaching(steps, seed=seed, attack="full_finetune", **changes) for seed in range(3)]

    control = runs(10, role="control")
    slower = frontier.judge(runs(30), control, 0.2, 200)
    assert slower.ratio == pytest.approx(3, rel=0.15) and not slower.censored and slower.seeds == 3
    never = frontier.judge(runs(10**9), control, 0.2, 200)
    assert never.censored and never.kept == pytest.approx(0.2)
    assert never.ratio == pytest.approx(1000 / 80**0.5)  # the base passes between the evaluations 8 and 10
    solved = [trace([(1, 0.7)], attack="ridge_probe", unit="solve", budget=1, seed=seed) for seed in range(3)]
    assert frontier.judge(solved, solved, 0.2, 200).ratio is None


def test_the_table_marks_what_no_other_method_is_better_than(frontier):
    def model(method, seed, drop, ratio, censored=False):
        own = {"censored": False, "seeds": 3, "probe": False}
        cells = {"full_finetune": {**own, "ratio": ratio, "censored": censored, "kept": 0.5},
                 "ridge_probe": {**own, "ratio": None, "kept": 0.4, "probe": True},
                 "whitened_probe_gd": {**own, "ratio": 1.0, "kept": 0.3, "probe": True}}  # fmt: skip
        return {"method": method, "seed": seed, "drop": drop, "cells": cells, "rir": ratio * 2}

    models = [model("a", 0, 1.0, 2.0), model("a", 1, 1.2, 2.2), model("a", 2, 1.1, 2.1),
              model("b", 0, 2.0, 1.5), model("c", 0, 3.0, 4.0, True),
              model("d", 0, 0.1, 1.1)]  # fmt: skip
    lines = frontier.table({"models": models}, ["full_finetune", "ridge_probe", "whitened_probe_gd"]).splitlines()
    rows = {line.split("|")[1].strip(): line for line in lines[2:]}
    assert [name for name, line in rows.items() if "●" in line] == ["a", "c", "d"]
    assert "+1.10 (" in rows["a"] and "2.10× (" in rows["a"] and "40.0 %" in rows["a"] and "30.0 %" in rows["a"]
    assert "≥ 4.00×" in rows["c"] and "(" not in rows["c"]  # one defence seed has no interval
    for one in models:  # a harmless task that is learned as fast as ever is no attacker
        one["cells"]["benign_full_finetune"] = {**one["cells"]["full_finetune"], "ratio": 1.0}
    assert frontier.weakest(models[0]) == (2.0, False)
    rho, count = frontier.correlations(models)["rir"]
    assert rho == pytest.approx(1.0) and count == 6
