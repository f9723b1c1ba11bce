"""What a search proposes after the drawn trials: a function of finished traces, the same for whoever asks."""

import dataclasses
import math

import pytest
from formula_exam import Formula
from trace_builders import trace

from hf_immunize.attacks import ATTACKS, TRAINABILITY, parse_settings, run_suite
from hf_immunize.attacks.vision._pruning import Pruner
from hf_immunize.certification.adapting import follow_base
from hf_immunize.certification.cells import build_cell
from hf_immunize.certification.planning import plan_exam, with_runs
from hf_immunize.certification.proposing import check_proposals, propose, proposed
from hf_immunize.errors import IncompleteExamError
from hf_immunize.exam import PROTOCOLS
from hf_immunize.exam.presets import run_departures
from hf_immunize.records import AttackTrace, Evaluation, Provenance, Search
from hf_immunize.stages.following import AfterBase, OnBase, adapting_attacks, read_base

NAME = "full_finetune"
HERE = Provenance.here("cpu")
SEARCH = Search(further=6, batch=2)
OPTIMUM = 3e-3


def tau(rate, batch_size):
    return 20 * 3 ** abs(math.log10(rate / OPTIMUM)) * (1 if batch_size == 8 else 1.5)


def run(rate, batch_size, scheduler, number=0, **changes):
    speed = tau(rate, batch_size)
    curve = [(step, 0.9 * (1 - math.exp(-step / speed))) for step in (1, 2, 4, 8, 16, 32, 64)]
    config = {"learning_rate": rate, "batch_size": batch_size, "scheduler": scheduler, "tuning_seeds": [0]}
    config |= {"proposed": number} if number else {}
    return trace(curve, trial=f"learning_rate={rate:g},batch_size={batch_size},scheduler={scheduler}", config=config,
                 budget=64, provenance=HERE, role="control", **changes)


DRAWN = [run(1e-4, 8, "linear"), run(1e-3, 32, "constant"), run(1e-2, 16, "cosine"), run(1e-1, 32, "linear")]


def searched(drawn=DRAWN, search=SEARCH):
    runs = list(drawn)
    while batch := propose(runs, search):
        runs += [run(*(dict(one.values)[name] for name in ("learning_rate", "batch_size", "scheduler")), one.number)
                 for one in batch]
    return runs


def test_proposals_stay_in_the_range_and_find_what_four_draws_missed():
    runs = searched()
    new = [one for one in runs if proposed(one)]
    assert [proposed(one) for one in new] == [1, 2, 3, 4, 5, 6] and len({one.trial for one in runs}) == 10
    assert all(1e-4 <= one.config["learning_rate"] <= 1e-1 for one in new)
    off = [abs(math.log10(one.config["learning_rate"] / OPTIMUM)) for one in new]
    assert min(off) < 0.2 < min(abs(math.log10(one.config["learning_rate"] / OPTIMUM)) for one in DRAWN)


def test_whoever_asks_gets_the_same_in_any_order_of_files():
    first = searched()
    assert propose(list(reversed(DRAWN)), SEARCH) == propose(DRAWN, SEARCH)
    assert [one.trial for one in searched()] == [one.trial for one in first]
    check_proposals(list(reversed(first)), SEARCH)


@pytest.mark.parametrize("forged", ["one less", "a hopeless one instead", "one more"])
def test_other_trials_than_the_searchs_are_refused(forged):
    runs = searched()
    worst = run(1e-4, 32, "cosine", 6)
    made = {"one less": runs[:-1], "a hopeless one instead": [*runs[:-1], worst],
            "one more": [*runs, run(1e-4, 32, "cosine", 7)]}[forged]
    with pytest.raises(IncompleteExamError, match="as the search proposes"):
        check_proposals(made, SEARCH)
    elsewhere = HERE.model_copy(update={"versions": HERE.versions | {"optuna": "1.0"}})
    old = [one.model_copy(update={"provenance": elsewhere}) for one in made]
    check_proposals(old, SEARCH)  # another release proposes otherwise; how many there are is compared between sides


def test_without_a_comparison_on_few_seeds_or_anything_that_varies_nothing_is_proposed():
    bare = [one.model_copy(update={"config": {**one.config, "tuning_seeds": None}}) for one in DRAWN]
    assert propose(bare, SEARCH) == [] and propose(DRAWN[:1], SEARCH) == []


def test_bars_are_medians_from_a_quarter_of_the_budget_on_and_stop_what_is_below():
    (first, _) = propose(DRAWN, SEARCH)
    assert [step for step, _ in first.bars] == [16, 32]
    scores = sorted(point.validation for one in DRAWN for point in one.curve if point.step == 16)
    assert first.bars[0][1] == pytest.approx((scores[1] + scores[2]) / 2, abs=1e-6)
    for score, stops in ((first.bars[0][1] - 0.01, True), (first.bars[0][1], False)):
        pruner = Pruner([Evaluation(step=12, validation=score, test=score)], first.bars, before=4)
        state, control = type("State", (), {"global_step": 12}), type("Control", (), {"should_training_stop": False})
        assert pruner.on_step_end(None, state, control).should_training_stop is stops
        assert bool(pruner.note) is stops


def sit(folder, role, base=None):
    protocol = PROTOCOLS["standard"]
    table = {NAME: dataclasses.replace(ATTACKS[NAME], run=Formula(role, tau=3.0).run)}
    settings = parse_settings(protocol.settings, ATTACKS)
    names = adapting_attacks(protocol, table, [NAME], settings, protocol.trials)
    after = None if base is None else AfterBase(protocol, names, read_base(base))
    run_suite(Formula(role, tau=3.0, good=0.003), table, [NAME], protocol.seeds, folder, settings,
              trials=protocol.trials, tuning_seeds=protocol.tuning_seeds, efforts=after.efforts() if after else {},
              follow=after or OnBase(protocol, names, []))
    return {path.name: AttackTrace.read(path) for path in sorted((folder / "traces" / role).glob("*.json"))}


def test_both_sides_search_alike_go_on_where_they_were_killed_and_are_judged(tmp_path):
    control = sit(tmp_path / "base", "control")
    subject = sit(tmp_path / "model", "subject", tmp_path / "base")
    protocol = PROTOCOLS["standard"]
    for side in (control, subject):
        assert len({run.trial for run in side.values() if proposed(run)}) == protocol.search.further
    lost = [name for name, run in control.items() if proposed(run) or run.seed]
    for name in lost:
        (tmp_path / "base" / "traces" / "control" / name).unlink()
    again = sit(tmp_path / "base", "control")
    assert {name: run.curve for name, run in again.items()} == {name: run.curve for name, run in control.items()}
    traces = {"control": list(control.values()), "subject": list(subject.values())}
    plan = plan_exam(protocol, ATTACKS, TRAINABILITY, traces)
    assert run_departures(plan, traces) == [] and plan.search == protocol.search
    kept, _ = follow_base(traces, with_runs(plan, traces), protocol.rule)
    assert build_cell(NAME, ATTACKS[NAME], kept, None, 100_000, protocol.rule).verdict != "NOT RUN"
    fewer = kept | {"subject": [run for run in kept["subject"] if not proposed(run)]}
    with pytest.raises(IncompleteExamError, match="as many proposed trials"):
        build_cell(NAME, ATTACKS[NAME], fewer, None, 100_000, protocol.rule)
