"""Verdicts on exams whose truth is known, drawn by ``benchmarks/verdict_errors.py`` (tables in docs/exam.md)."""

import importlib.util
from collections import Counter
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "verdict_errors.py"


@pytest.fixture(scope="module")
def simulated():
    spec = importlib.util.spec_from_file_location("verdict_errors", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_copy_of_the_base_never_resists(simulated):
    draw = simulated.CASES["a copy of the base"][1]
    found = Counter(draw(simulated.Simulator(exam, 5)).verdict for exam in range(200))
    assert found["RESISTS"] == 0 and found["FAILS"] >= 190, found


@pytest.mark.parametrize("case, seeds, least", [
    ("slowed 2 times", 5, 18), ("slowed 20 times", 10, 18), ("never learns", 5, 18), ("a base without uplift", 5, 18),
    ("helps the attacker", 5, 19),
])
def test_what_is_clear_is_judged_right(simulated, case, seeds, least):
    right, draw = simulated.CASES[case]
    found = Counter(draw(simulated.Simulator(5000 + exam, seeds)).verdict for exam in range(20))
    assert found[right] >= least, found
    assert right == "RESISTS" or not found["RESISTS"], found


def test_three_seeds_never_resist(simulated):
    found = {simulated.CASES["never learns"][1](simulated.Simulator(exam, 3)).verdict for exam in range(10)}
    assert "RESISTS" not in found


def test_slow_downs_are_covered_as_written(simulated):
    hits = [simulated.covers(simulated.Simulator(exam, 5).cell(6.0).slow_down, 6.0) for exam in range(80)]
    assert sum(hits) >= 0.9 * len(hits)


@pytest.mark.parametrize("case", ["a copy of the base", "slowed 3 times", "slowed 6 times", "never learns"])
def test_leaving_out_seeds_changes_no_verdict(simulated, case):
    draw = simulated.CASES[case][1]
    for exam in range(12):
        whole, short = (simulated.Simulator(9000 + exam, 5, curtailed=early) for early in (False, True))
        assert draw(whole).verdict == draw(short).verdict
        assert short.spent in (3, 5)


def test_leaving_out_seeds_saves_some_of_a_copy_of_the_base_and_changes_no_verdict(simulated):
    spent, verdicts = [], []
    for exam in range(20):
        whole, short = (simulated.Simulator(7000 + exam, 5, tuned=True, curtailed=early) for early in (False, True))
        verdicts.append(whole.cell(1.0).verdict)
        assert short.cell(1.0).verdict == verdicts[-1]
        spent.append(short.spent)
    assert spent.count(3) >= 10 and whole.spent == 5 and verdicts.count("FAILS") >= 18
