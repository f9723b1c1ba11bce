"""Certified trials made again: honest ones agree whatever the settings, false ones are found. Real, tiny runs."""

import dataclasses
import math
import random

import pytest
from circumstances import CIRCUMSTANCES, DOES_NOT_APPLY, LORA, STEPS, Blobs, sit
from tiny_exam import SETTINGS

from hf_immunize.certification.curves import LEAST_SCORE, compare_trial
from hf_immunize.certification.search import search_afresh
from hf_immunize.certification.trials import certified_trials, draw_trials, repeat_trials, run_again
from hf_immunize.errors import ConfigError, RecordError
from hf_immunize.exam.means import Means
from hf_immunize.records import AttackTrace, Certificate, Evaluation, sha256_file

QUICK = ("a tenth of the rows", "one seed")
"""The others, and many rechecks of each, are for benchmarks/honest_rechecks.py and for -m slow."""


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CIRCUMSTANCES]
)
def test_honest_certificates_are_not_accused_whatever_the_circumstances(tmp_path, trained_base, exam_data, name):
    settings, told = CIRCUMSTANCES[name]
    subject, bench = sit(tmp_path, trained_base, exam_data, settings, **told)
    plan = Certificate.read(subject / "certificate.json").plan
    assert plan.means == told.get("means", Means()).described
    for seed in range(2):
        record = repeat_trials(subject, bench, 3, seed)
        assert record.holds and len(record.trials) == min(3, record.drawn_from), record
        assert all(item.distance == 0 for item in record.trials), "the same machine makes the same runs"
        assert record.certificate_sha256 == sha256_file(subject / "certificate.json") and record.drawn_with == seed


@pytest.fixture(scope="module")
def exam(tmp_path_factory, trained_base, exam_data):
    """An honest exam, its bench, its trials, and each of them made again once."""
    told = {**SETTINGS, **LORA, **DOES_NOT_APPLY}
    subject, bench = sit(tmp_path_factory.mktemp("exam"), trained_base, exam_data, told)
    trials = certified_trials(subject, Certificate.read(subject / "certificate.json"))
    company = {key: [run for other, runs in trials.items() if other[:2] == key[:2] for run in runs] for key in trials}
    return subject, bench, trials, {key: run_again(bench, runs, company[key]) for key, runs in trials.items()}


def test_every_trial_can_be_drawn_losers_controls_and_what_does_not_apply(exam):
    trials = exam[2]
    drawn = {key for seed in range(60) for key in draw_trials(trials, 3, seed)}
    assert drawn == set(trials) and {key[0] for key in drawn} == {"subject", "control"}
    assert {key[1] for key in drawn} == {*SETTINGS, *LORA, *DOES_NOT_APPLY}
    assert draw_trials(trials, 3, 1) == draw_trials(trials, 3, 1) != draw_trials(trials, 3, 2)
    with pytest.raises(ConfigError, match="at least one trial"):
        draw_trials(trials, 0, 0)


def flattened(trace):
    """The attack hardly learns."""
    low = trace.curve[0].test
    return [dataclasses_point(point, low + 0.1 * (point.test - low)) for point in trace.curve]


def dataclasses_point(point, value):
    return Evaluation(step=point.step, validation=value, test=value)


def hastened(trace):
    """The attack, on the base, is at its end from the start."""
    return [dataclasses_point(point, trace.curve[-1].test) for point in trace.curve]


LIES = {
    "flattened": lambda trace: trace.model_copy(update={"curve": flattened(trace)}),
    "hastened": lambda trace: trace.model_copy(update={"curve": hastened(trace)}),
    "diverged": lambda trace: trace.model_copy(update={"curve": trace.curve[:1], "outcome": "diverged", "note": "nan"}),
    "does not apply": lambda trace: trace.model_copy(
        update={"curve": [], "outcome": "not_applicable", "note": "no such layer"}),
    "chosen badly": lambda trace: trace.model_copy(update={"curve": [
        point.model_copy(update={"validation": point.validation / 2}) for point in trace.curve]}),
    "fewer evaluations": lambda trace: trace.model_copy(update={"curve": trace.curve[:2]}),
}


def learns(runs):
    """Whether lies about these runs would matter: they climb well above where they start."""
    return all(run.curve and run.curve[-1].test - min(point.test for point in run.curve) > 0.25 for run in runs)


@pytest.mark.parametrize("lie", LIES)
def test_a_false_trial_does_not_agree(exam, lie):
    trials, again = exam[2:]
    wrong = [key for key, runs in trials.items() if learns(runs) and len(runs[0].curve) > 3]
    assert len(wrong) >= 4
    for key in wrong:
        found = compare_trial([LIES[lie](run) for run in trials[key]], again[key], 30)
        assert not found.agrees, (key, found)
        assert compare_trial(trials[key], again[key], 30).agrees


def test_with_a_fifth_of_the_trials_false_three_at_a_time_find_out_within_twenty_draws(exam):
    """Computed for draws without replacement where every false trial shows; measured over 200 liars as they like."""
    trials, again = exam[2:]
    false, count = round(len(trials) / 5), len(trials)
    missed = math.comb(count - false, 3) / math.comb(count, 3)
    assert 1 - missed**20 > 0.9999 and 1 - (1 - 1 / 5) ** 60 > 0.9999, "however many trials there are"
    telling = [key for key, runs in trials.items() if learns(runs)]
    found_out, first = 0, []
    for liar in range(200):
        chance = random.Random(liar)
        false = set(chance.sample(telling, max(1, round(len(trials) / 5))))
        told = {key: [LIES[chance.choice(sorted(LIES))](run) for run in runs] if key in false else runs
                for key, runs in trials.items()}
        caught = next((draw for draw in range(20) if any(
            not compare_trial(told[key], again[key], 30).agrees
            for key in draw_trials(trials, 3, 1000 * liar + draw))), None)
        found_out += caught is not None
        first.append(20 if caught is None else caught + 1)
    assert found_out >= 190, f"found out {found_out} of 200"
    assert sum(first) / len(first) < 5


def test_the_bound_is_what_new_seeds_do_and_no_certificate_can_widen_it(exam):
    trials, again = exam[2:]
    key = next(key for key, runs in trials.items() if key[1] == "full_finetune" and key[0] == "subject")
    wild = [run.model_copy(update={"curve": [
        dataclasses_point(point, float(run.seed % 2)) for point in run.curve]}) for run in trials[key]]
    found = compare_trial(wild, again[key], 30)
    assert not found.agrees and found.bound < 0.9
    one_row = [run.model_copy(update={"curve": [
        dataclasses_point(point, min(1.0, point.test + 1 / 30)) for point in run.curve]}) for run in again[key]]
    assert compare_trial(one_row, again[key], 30).agrees, "another processor puts a row at a boundary elsewhere"
    assert compare_trial(trials[key], again[key], None).bound >= LEAST_SCORE


def test_when_a_restless_attacker_is_thrown_back_is_nobodys_lie_and_where_he_ends_is(exam):
    """At the edge of what descends rounding decides the step: seen with other kernels at a rate of 64."""
    some = next(runs for runs in exam[2].values() if len(runs) == 3)

    def curves(*scores):
        return [run.model_copy(update={"outcome": "completed", "note": None, "curve": [
            Evaluation(step=step + 1, validation=score, test=score) for step, score in enumerate(scores)]})
            for run in some]

    here = curves(0.6, 0.9, 0.9, 0.4, 0.9, 0.9, 0.9, 1.0, 1.0, 1.0, 1.0, 1.0)
    assert compare_trial(curves(0.6, 0.9, 0.9, 0.9, 0.9, 0.5, 0.9, 1.0, 1.0, 1.0, 1.0, 1.0), here, 30).agrees
    late = compare_trial(curves(0.6, 0.9, 0.9, 0.4, 0.9, 0.9, 0.9, 1.0, 1.0, 1.0, 0.5, 1.0), here, 30)
    assert not late.agrees and "step 11" in late.told
    calm = curves(0.6, 0.7, 0.8, 0.9, 0.9, 0.9, 0.9, 1.0, 1.0, 1.0, 1.0, 1.0)
    assert not compare_trial(curves(0.6, 0.9, 0.9, 0.9, 0.9, 0.5, 0.9, 1.0, 1.0, 1.0, 1.0, 1.0), calm, 30).agrees


def test_a_run_whose_divergence_hangs_by_a_thread_accuses_nobody(exam):
    trials, again = exam[2:]
    key = next(key for key, runs in trials.items() if learns(runs) and len(runs[0].curve) > 3)
    broken = LIES["diverged"](again[key][0])
    assert not compare_trial([broken, *trials[key][1:]], again[key], 30).agrees
    mixed = [LIES["diverged"](again[key][1]) if run.seed == again[key][1].seed else run for run in again[key]]
    assert compare_trial([broken, *trials[key][1:]], mixed, 30).agrees


def test_other_rows_weights_or_traces_are_refused(tmp_path, trained_base, exam_data):
    subject, bench = sit(tmp_path, trained_base, exam_data, STEPS)
    other = Blobs((dataclasses.replace(exam_data[0], harmful=exam_data[0].harmful[::-1]), exam_data[1]))
    with pytest.raises(RecordError, match="expected the harmful rows that the certificate names"):
        repeat_trials(subject, dataclasses.replace(bench, task=other, _contexts={}), 1, 0)
    for name in Certificate.read(subject / "certificate.json").traces:  # whichever is drawn
        if (subject / name).exists():
            AttackTrace.read(subject / name).model_copy(update={"seconds": 9.0}).write(subject / name)
    with pytest.raises(RecordError, match="as it was certified, got another or no file"):
        repeat_trials(subject, bench, 1, 0)
    unknown = dataclasses.replace(bench, table={})
    with pytest.raises(RecordError, match="expected an attack of this release"):
        unknown.attack("no_such_finetune")


def test_a_search_afresh_ignores_stored_curves_and_finds_what_they_hide(exam):
    subject, bench = exam[:2]
    found = search_afresh(subject, bench, 6, 1)
    assert len(found) == 6 and found == search_afresh(subject, bench, 6, 1)
    assert all(item.seed >= 10_000 for item in found)
    ratios = [item.ratio for item in found if item.ratio is not None]
    assert ratios == sorted(ratios) and ratios[0] == 1, "the model is its own base: nothing is slowed"
    assert "reaches in" in found[0].told and {item.attack for item in found} <= {*SETTINGS, *LORA}
    with pytest.raises(ConfigError, match="at least one attack"):
        search_afresh(subject, bench, 0, 1)
