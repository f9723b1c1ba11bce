"""Metrics against slow truths, properties, and the coverage of their intervals by simulation."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

sys.path.insert(0, str(Path(__file__).parent))

from trace_builders import reaching, side_of, trace

from hf_immunize.attacks import evaluation_steps
from hf_immunize.errors import RecordError
from hf_immunize.metrics import (
    StepsToThreshold,
    best_trial,
    chosen_evaluation,
    immunization_ratio,
    immunization_ratio_spread,
    mean_interval,
    normalized_resistance,
    paired_drop_interval,
    relative_fine_tuning_deviation,
    runs_of_trial,
    slow_down,
    steps_to_threshold,
    student_t_quantile,
    summarise_side,
    wilson_interval,
)
from hf_immunize.records import SpectrumRecord, half_sample_interval

accuracies = st.lists(st.integers(0, 10).map(lambda tenth: tenth / 10), min_size=1, max_size=12)


def reached(*steps, budget=1000):
    """Exactly known steps per seed."""
    return {seed: StepsToThreshold(step, step, budget) for seed, step in enumerate(steps)}


# steps to the threshold


@given(accuracies, st.integers(1, 10).map(lambda tenth: tenth / 10))
def test_steps_to_threshold_is_the_first_step_at_which_the_kept_checkpoint_passes(values, threshold):
    """Where validation and test agree, what was kept is the best so far."""
    run = trace([(step + 1, value) for step, value in enumerate(values)])
    slow = next((i + 1 for i in range(len(values)) if values[i] >= threshold), None)
    found = steps_to_threshold(run, threshold)
    assert found.steps == slow and found.budget == 1000
    if slow is not None:
        assert found.earliest == slow  # every step was evaluated, so nothing was rounded
    assert (found.steps is None) == (max(values) < threshold)


@given(accuracies, st.integers(1, 9).map(lambda tenth: tenth / 10))
def test_a_higher_threshold_is_never_reached_sooner(values, threshold):
    run = trace([(step + 1, value) for step, value in enumerate(values)])
    low, high = (steps_to_threshold(run, level).steps for level in (threshold, threshold + 0.1))
    assert (low if low is not None else math.inf) <= (high if high is not None else math.inf)


def test_the_resolution_of_the_evaluations_is_kept():
    found = steps_to_threshold(reaching(70), 0.5)
    assert (found.steps, found.earliest) == (75, 61)
    assert steps_to_threshold(reaching(1), 0.5) == StepsToThreshold(1, 1, 1000)
    late = trace([(10, 0.9), (20, 0.9)])
    assert steps_to_threshold(late, 0.5) == StepsToThreshold(10, 1, 1000)


def test_what_was_reached_is_kept_whatever_the_run_did_later():
    """An attacker saves checkpoints: neither a falling curve nor NaN at the end takes his model from him."""
    assert steps_to_threshold(trace([(1, 0.9), (2, 0.4)]), 0.5).steps == 1
    assert steps_to_threshold(trace([(1, 0.9), (2, 0.9)], outcome="diverged"), 0.5).steps == 1
    assert steps_to_threshold(trace([], outcome="diverged"), 0.5).steps is None


def test_he_who_looks_at_validation_alone_may_throw_a_better_model_away():
    assert steps_to_threshold(trace([(1, 0.6, 0.9), (2, 0.7, 0.4)]), 0.5).steps is None
    assert steps_to_threshold(trace([(1, 0.6, 0.9), (2, 0.7, 0.4), (3, 0.8, 0.6)]), 0.5).steps == 3


def test_splits_are_kept_apart():
    run = trace([(1, 0.9, 0.1), (2, 0.9, 0.9)])
    assert steps_to_threshold(run, 0.5, "validation").steps == 1
    assert steps_to_threshold(run, 0.5, "test").steps == 2


# the attacker's choice


def test_the_trial_is_chosen_on_validation_and_never_on_test():
    honest = [trace([(1, 0.6, 0.1), (2, 0.6, 0.1)], trial="a", seed=seed) for seed in (0, 1)]
    lucky = [trace([(1, 0.2, 0.9), (2, 0.2, 0.9)], trial="b", seed=seed) for seed in (0, 1)]
    assert best_trial(honest + lucky, 0.5) == "a"
    assert summarise_side(honest + lucky, 0.5).accuracy == [0.1, 0.1]


def test_fewest_median_steps_then_accuracy_and_a_diverged_run_costs_its_seed():
    fast = side_of("subject", (10, 10, 1000), trial="fast")
    slow = side_of("subject", (30, 30, 30), trial="slow")
    assert best_trial(fast + slow, 0.5) == "fast"
    weak = side_of("subject", (30, 30, 30), trial="weak", high=0.7)
    assert best_trial(weak + slow, 0.5) == "slow"
    broken = [*fast[:2], trace([(1, 0.2)], trial="fast", seed=2, outcome="diverged")]
    assert best_trial(broken + slow, 0.5) == "fast", "a run that diverges costs its seed, not its trial"
    assert summarise_side(broken + slow, 0.5).diverged == 1
    assert summarise_side(broken + slow, 0.5).trials == 2


def test_a_trial_without_any_evaluation_cannot_be_chosen():
    empty = [trace([], trial="empty", outcome="diverged")]
    assert best_trial(empty, 0.5) is None
    side = summarise_side(empty, 0.5)
    assert (side.trial, side.accuracy, side.steps_to_threshold, side.diverged) == (None, [], [], 1)


def test_accuracy_is_that_of_the_best_validation_evaluation():
    run = trace([(1, 0.3, 0.9), (2, 0.8, 0.5), (3, 0.8, 0.7), (4, 0.1, 1.0)])
    assert chosen_evaluation(run).step == 3, "of equally good ones the longest trained"
    assert summarise_side([run], 0.5).accuracy == [0.7]


def test_a_seed_twice_is_refused():
    with pytest.raises(RecordError, match="expected one run of lora learning_rate=0.1 with seed 0, got two"):
        runs_of_trial([reaching(5), reaching(9)], "learning_rate=0.1")


# intervals


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 8, 13, 30])
@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.999])
def test_student_t_quantile_is_scipys(level, degrees):
    assert student_t_quantile(level, degrees) == pytest.approx(stats.t.ppf((1 + level) / 2, degrees), rel=1e-9)


@pytest.mark.parametrize("level, degrees", [(0.0, 3), (1.0, 3), (0.95, 0)])
def test_student_t_quantile_refuses_nonsense(level, degrees):
    with pytest.raises(RecordError, match=r"expected a level in \(0, 1\) and a degree of freedom"):
        student_t_quantile(level, degrees)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=8))
def test_mean_interval_is_scipys(values):
    assume(np.std(values) > 1e-6)
    found = mean_interval(values)
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6))


def test_one_value_has_no_bounds_and_none_has_nothing():
    assert mean_interval([0.3]).model_dump(include={"estimate", "low", "high", "samples"}) == {
        "estimate": 0.3, "low": None, "high": None, "samples": 1}
    assert mean_interval([]).estimate is None


@given(st.integers(0, 300), st.integers(1, 300))
def test_wilson_interval_is_scipys(hits, rows):
    assume(hits <= rows)
    found, wanted = wilson_interval(hits / rows, rows), stats.binomtest(hits, rows).proportion_ci(method="wilson")
    assert (found.low, found.high) == (pytest.approx(wanted.low, abs=1e-9), pytest.approx(wanted.high, abs=1e-9))


def test_wilson_refuses_no_rows():
    with pytest.raises(RecordError, match=r"expected a share in 0..1 of at least one row"):
        wilson_interval(0.5, 0)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_paired_drop_is_signed_mirrored_and_never_certain(pairs):
    base, immunized = zip(*pairs, strict=True)
    found, mirrored = paired_drop_interval(base, immunized), paired_drop_interval(immunized, base)
    assert found.estimate == pytest.approx(100 * (np.mean(base) - np.mean(immunized)))
    assert found.low < found.high and found.low == pytest.approx(-mirrored.high)


def test_paired_drop_covers():
    """Nominal 95 % over 600 draws of a 2-point drop, 250 rows: Agresti and Min's interval covers 92 to 98.5 %."""
    random, hits = np.random.default_rng(0), 0
    for _ in range(600):
        outcome = random.random(250)
        base, immunized = outcome > 0.03, (outcome > 0.03) & (random.random(250) > 0.03) | (outcome < 0.0091)
        found = paired_drop_interval(base.tolist(), immunized.tolist())
        hits += found.low <= 100 * (0.97 * 0.03 - 0.0091) <= found.high
    assert 0.92 <= hits / 600 <= 0.98


def test_paired_drop_needs_the_same_rows():
    with pytest.raises(RecordError, match="expected outcomes of two models on the same rows, got 2 and 1"):
        paired_drop_interval([True, False], [True])


# slow-down


def test_equal_models_are_not_slowed_down():
    found = slow_down(reached(10, 20, 40), reached(10, 20, 40))
    assert found.estimate == pytest.approx(1) and found.low <= 1 <= found.high and found.samples == 3


def test_slow_down_is_the_geometric_mean_of_paired_ratios():
    found = slow_down(reached(20, 80, 90), reached(10, 10, 30))
    logs = np.log([2, 8, 3])
    low, high = stats.t.interval(0.95, 2, logs.mean(), stats.sem(logs))
    assert found.estimate == pytest.approx(48 ** (1 / 3))
    assert (found.low, found.high) == (pytest.approx(np.exp(low)), pytest.approx(np.exp(high)))


@given(st.lists(st.tuples(st.integers(1, 1000), st.integers(1, 1000)), min_size=2, max_size=6))
def test_swapping_the_sides_inverts_the_slow_down(pairs):
    top, bottom = zip(*pairs, strict=True)
    found, swapped = slow_down(reached(*top), reached(*bottom)), slow_down(reached(*bottom), reached(*top))
    assert found.estimate == pytest.approx(1 / swapped.estimate)
    assert found.low == pytest.approx(1 / swapped.high)


@given(
    st.lists(st.tuples(st.one_of(st.none(), st.integers(1, 1000)), st.integers(1, 1000)), min_size=2, max_size=6)
)
def test_not_reached_never_closes_the_upper_bound(pairs):
    top, bottom = zip(*pairs, strict=True)
    found = slow_down(reached(*top), reached(*bottom))
    missed = top.count(None)
    assert (found.high is None) == (missed > 0)
    assert found.low is not None
    if missed > len(top) / 2:
        assert found.estimate is None
    if 0 < missed < len(top) / 2:
        assert found.estimate is not None


@given(st.lists(st.tuples(st.integers(1, 900), st.integers(1, 1000)), min_size=2, max_size=6))
def test_censoring_never_raises_the_mean_bound_beyond_the_budget(pairs):
    """All censored: the lower bound is about budget/T_base, whatever the true steps would have been."""
    bottom = [base for _, base in pairs]
    found = slow_down(reached(*[None] * len(pairs)), reached(*bottom))
    assert found.low <= 1000 / np.exp(np.mean(np.log(bottom))) * (1 + 1e-9)


def test_censored_controls_open_the_lower_bound_and_hopeless_pairs_are_left_out():
    found = slow_down(reached(10, 20), reached(None, 10))
    assert found.low is None and found.high is not None
    nothing = slow_down(reached(None, None), reached(None, None))
    assert (nothing.estimate, nothing.low, nothing.high, nothing.samples) == (None, None, None, 0)
    assert slow_down(reached(None, 20, 40), reached(None, 10, 20)).samples == 2


def test_one_pair_has_no_bounds():
    found = slow_down(reached(20), reached(10))
    assert (found.estimate, found.low, found.high) == (pytest.approx(2), None, None)


def test_rounding_of_the_evaluation_grid_keeps_the_interval_open():
    """Three seeds that happen to stop at the same evaluations are not three certain ratios."""
    found = slow_down(
        {seed: StepsToThreshold(75, 61, 1000) for seed in range(3)},
        {seed: StepsToThreshold(12, 11, 1000) for seed in range(3)},
    )
    variance = (math.log(75 / 61) ** 2 + math.log(12 / 11) ** 2) / 12
    half = stats.t.ppf(0.975, 2) * math.sqrt(variance / 3)
    assert found.low == pytest.approx(75 / 12 * math.exp(-half)) and found.high == pytest.approx(
        75 / 12 * math.exp(half))


def on_grid(steps):
    grid = evaluation_steps(100_000)
    place = next(index for index, step in enumerate(grid) if step >= steps)
    return StepsToThreshold(grid[place], grid[place - 1] + 1 if place else 1, 100_000)


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("spread, most", [(0.02, 1.0), (0.2, 0.98), (0.5, 0.98)])
def test_slow_down_interval_covers(seeds, spread, most):
    """Nominal 95 % over 800 synthetic exams with log-normal steps on a geometric evaluation grid.

    Where seeds differ by less than the spacing of evaluations, the interval is that of the spacing: it covers more.
    """
    random, hits = np.random.default_rng(1), 0
    for _ in range(800):
        base = random.uniform(15, 45)
        control = {s: on_grid(base * math.exp(spread * random.standard_normal())) for s in range(seeds)}
        subject = {s: on_grid(5 * base * math.exp(spread * random.standard_normal())) for s in range(seeds)}
        found = slow_down(subject, control)
        hits += found.low <= 5 <= found.high
    assert 0.92 <= hits / 800 <= most


# the others


def test_signed_rfd_by_hand():
    control = trace([(1, 0.2), (2, 0.8), (4, 0.5)])
    subject = trace([(1, 0.1), (2, 1.0), (8, 0.9)])
    assert relative_fine_tuning_deviation(subject, control) == pytest.approx(100 * (0.5 - 0.25) / 2)
    assert relative_fine_tuning_deviation(trace([(16, 0.1)]), control) is None
    assert relative_fine_tuning_deviation(trace([(1, 0.5)]), trace([(1, 0.0)])) is None


@given(accuracies)
def test_rfd_of_a_model_with_itself_is_zero(values):
    run = trace([(step + 1, value) for step, value in enumerate(values)])
    assert relative_fine_tuning_deviation(run, run) in (None, 0.0)


def test_a_faster_attack_has_a_negative_rfd():
    assert relative_fine_tuning_deviation(reaching(10), reaching(100)) < 0 < relative_fine_tuning_deviation(
        reaching(100), reaching(10))


@pytest.mark.parametrize("steps, rho", [((10, 20, 30), 0.0), ((100, 200, 300), 1.0), ((31.6, 63.2, 94.9), 0.5)])
def test_normalized_resistance_runs_from_base_to_scratch(steps, rho):
    found = normalized_resistance(reached(*steps), reached(10, 20, 30), reached(100, 200, 300))
    assert found.estimate == pytest.approx(rho, abs=1e-3) and found.low <= rho <= found.high


def test_normalized_resistance_says_nothing_without_its_references():
    base, scratch = reached(10, 20), reached(100, 200)
    assert normalized_resistance(base, reached(10, None), scratch) is None
    assert normalized_resistance(base, base, reached(100, None)) is None
    assert normalized_resistance(base, scratch, base) is None
    assert normalized_resistance(base, base, {}) is None
    censored = normalized_resistance(reached(None, 50), base, scratch)
    assert censored.estimate is None and censored.high is None and censored.low is not None


@settings(max_examples=30)
@given(st.floats(1, 1e6), st.floats(1, 1e6), st.floats(1, 1e6), st.floats(1, 1e6))
def test_immunization_ratio_by_hand(h0, p0, h1, p1):
    def spectra(harmful, primary):
        return [
            SpectrumRecord(site="classifier", task=task, rows=9, width=2, rank=2, status="ok", centered=True,
                           feature_dtype="float32", condition_number=value, effective_rank=2.0, eigenvalues=[1.0])
            for task, value in (("harmful", harmful), ("primary", primary))
        ]

    ratio, parts = immunization_ratio(spectra(h0, p0), spectra(h1, p1))
    assert ratio == pytest.approx((h1 / h0) / (p1 / p0))
    assert parts == {"harmful": pytest.approx(h1 / h0), "primary": pytest.approx(p1 / p0)}
    assert immunization_ratio(spectra(h0, p0), spectra(None, p1)) == (None, {"harmful": None, "primary": p1 / p0})
    with pytest.raises(RecordError, match="expected one harmful spectrum per model, got 2"):
        immunization_ratio(spectra(h0, p0) * 2, spectra(h1, p1))


def test_a_ratio_carries_its_spread_over_halves_of_the_rows():
    def spectra(harmful, primary, halves):
        return [
            SpectrumRecord(site="classifier", task=task, rows=99, width=2, rank=2, status="ok", centered=True,
                           feature_dtype="float32", condition_number=value, effective_rank=2.0, eigenvalues=[1.0],
                           condition_of_halves=[value * factor for factor in halves])
            for task, value in (("harmful", harmful), ("primary", primary))
        ]

    steady = immunization_ratio_spread(spectra(2, 2, (1.0, 1.0)), spectra(200, 2, (1.0, 1.0)))
    assert (steady.low, steady.estimate, steady.high, steady.samples) == (100, 100, 100, 2)
    halves = spectra(200, 2, (1.0, 1.0))
    halves[0] = halves[0].model_copy(update={"condition_of_halves": [200 * math.e, 200 / math.e]})
    wide = immunization_ratio_spread(spectra(2, 2, (1.0, 1.0)), halves)
    assert wide.high / 100 == pytest.approx(math.exp(1.959964), rel=1e-5) and wide.low * wide.high == pytest.approx(1e4)
    assert immunization_ratio_spread(spectra(2, 2, ()), spectra(2, 2, ())) is None


@pytest.mark.parametrize("whole, halves", [(None, [1.0]), (1.0, [None, 1.0]), (0.0, [1.0]), (1.0, [])])
def test_what_is_not_defined_has_no_spread(whole, halves):
    assert half_sample_interval(whole, halves) is None
