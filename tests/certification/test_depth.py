"""Steps on mean curves, T(n) and what a profile proposes, on curves whose answer is built in."""

from __future__ import annotations

import math

import pytest
from trace_builders import GRID, reaching, trace

from hf_immunize.certification.depth import Measured, Trunk, bounds, judge_depth
from hf_immunize.certification.mean_curves import crossing, curve_ratio, mean_curve
from hf_immunize.errors import IncompleteExamError
from hf_immunize.records import DepthRule, Evaluation

BLOCKS = [f"b.{place}" for place in range(4)]
TRUNK = Trunk(BLOCKS, [[name] for name in BLOCKS], [*BLOCKS[1:], "norm"], "head")


def rising(middle: float, seed: int, **changes):
    """Accuracy 0.2 + 0.7·sigmoid(4·log(step/middle)): it passes 0.55 at ``middle``."""
    return trace([(step, 0.2 + 0.7 / (1 + (middle / step) ** 4)) for step in GRID], seed=seed, **changes)


def solved(score: float, seed: int, **changes):
    return trace([(1, score)], seed=seed, unit="solve", budget=1, trial="default", config={}, **changes)


def test_a_mean_curve_is_that_of_what_is_held_and_a_diverged_run_keeps_what_it_had():
    runs = [trace([(1, 0.2), (2, 0.6), (4, 0.4)]), trace([(1, 0.4), (2, 0.8)], seed=1, outcome="diverged")]
    assert [(point.step, round(point.test, 9)) for point in mean_curve(runs)] == [(1, 0.3), (2, 0.7), (4, 0.7)]


def test_a_crossing_lies_between_evaluations_on_a_log_scale_and_counts_for_good():
    def curve(*pairs):
        return [Evaluation(step=step, validation=value, test=value) for step, value in pairs]

    assert crossing(curve((10, 0.4), (40, 0.6)), 0.5) == pytest.approx(20.0)
    assert crossing(curve((1, 0.6), (10, 0.4), (40, 0.6)), 0.5) == pytest.approx(20.0)
    assert crossing(curve((3, 0.7), (9, 0.8)), 0.5) == 3 and crossing(curve((3, 0.1), (9, 0.4)), 0.5) is None


def test_the_ratio_of_two_mean_curves_is_the_one_that_was_built():
    control = {seed: rising(20 * 1.1**seed, seed) for seed in range(5)}
    subject = {seed: rising(60 * 1.1**seed, seed) for seed in range(5)}
    found = curve_ratio(subject, control, 0.55)
    assert found.estimate == pytest.approx(3, rel=0.02) and found.low < 3 < found.high and found.high < 3.3
    noisy = {seed: rising(60 * (0.5, 1, 2, 0.7, 1.4)[seed], seed) for seed in range(5)}
    wide = curve_ratio(noisy, control, 0.55)
    assert wide.high / wide.low > 2 > found.high / found.low
    never = {seed: reaching(10**9, seed=seed) for seed in range(5)}
    least = curve_ratio(never, control, 0.55)
    assert least.estimate is None and least.high is None and least.low > 1000 / 25 / 1.5
    assert curve_ratio(subject, never, 0.55).low is None


def measured(steps, *, trained=(0.5, 0.5, 0.8, 0.9), random=(0.4, 0.5, 0.5, 0.4), base=0.9):
    """Two rates for every n, of which the slower one is no choice; 200 test rows, five classes."""
    slower = {"trial": "learning_rate=0.01", "config": {"learning_rate": 0.01}}
    resets = {
        count: [run for seed in range(5) for run in (
            rising(middle, seed, attack=f"reset_{count}"), rising(9 * middle, seed, attack=f"reset_{count}", **slower),
        )] for count, middle in steps.items()
    }  # fmt: skip
    nothing = [solved(0.2, seed, attack="pixel_ridge", role="nothing") for seed in range(5)]
    probes = [[[solved(score, seed) for seed in range(3)] for score in scores] for scores in (trained, random)]
    return Measured(resets, *probes, nothing, 200, 5)


def test_the_fewest_last_blocks_that_leave_room_are_proposed_and_sites_lie_in_them():
    judged = judge_depth(measured({0: 10, 1: 8, 2: 15, 3: 90, 4: 120, None: 5000}), TRUNK, DepthRule())
    assert [point.blocks for point in judged.resets] == [0, 1, 2, 3, 4, None]
    assert judged.resets[0].learning_rate == 0.1 and judged.threshold == pytest.approx(0.55, abs=0.01)
    assert [round(point.steps, 1) if point.steps else None for point in judged.resets[:3]] == [
        pytest.approx(10, rel=0.03), pytest.approx(8, rel=0.03), pytest.approx(15, rel=0.03)]
    told = judged.proposal
    assert told.trainable_modules == "last:3" and told.blocks == 3 and told.bound == pytest.approx(9, rel=0.05)
    assert told.sites == ["b.3", "norm", "head"]  # outputs of b.2 and b.3: b.1 tells no more than random weights
    assert "last 3 block(s)" in told.told and "last 2 cannot" in told.told
    assert judged.uplift.estimate == pytest.approx(0.7, abs=0.01)
    assert judged.without.mean == pytest.approx(0.2, abs=0.01)


def test_what_a_deeper_reset_undoes_bounds_the_shallower_ones():
    """n = 1 costs 20 times, but whoever draws two blocks anew is back at 1.5: he will do that."""
    judged = judge_depth(measured({0: 10, 1: 200, 2: 15, 3: 90, 4: 120}), TRUNK, DepthRule())
    reach = bounds(judged.resets, 1000)
    assert reach[1][0] == pytest.approx(1.5, rel=0.05) and reach[3][0] == pytest.approx(9, rel=0.05)
    assert judged.proposal.trainable_modules == "last:3"


def test_stages_of_several_blocks_are_trained_whole():
    trunk = Trunk(BLOCKS, [BLOCKS[:1], BLOCKS[1:3], BLOCKS[3:]], TRUNK.sites, "head")
    told = judge_depth(measured({0: 10, 1: 10, 2: 90, 3: 95, 4: 120}), trunk, DepthRule()).proposal
    assert told.trainable_modules == "last:2" and told.blocks == 3


def test_without_room_the_whole_network_is_trained_and_a_short_budget_is_said():
    judged = judge_depth(measured({0: 10, 1: 10, 2: 12, 3: 14, 4: 20}), TRUNK, DepthRule())
    assert judged.proposal.trainable_modules is None and judged.proposal.blocks == 4
    assert "No last blocks leave room" in judged.proposal.told and not judged.proposal.at_least
    short = judge_depth(measured({0: 400, 1: 10**6}), TRUNK, DepthRule())
    assert short.proposal.at_least and "not known" in short.proposal.told and short.proposal.bound < 4
    with pytest.raises(IncompleteExamError, match="n = 0"):
        judge_depth(measured({1: 10}), TRUNK, DepthRule())


def test_the_rule_says_its_constants():
    assert "at least 4" in DepthRule().in_words() and "at least 2.5" in DepthRule(target=2.5).in_words()
    assert math.isclose(DepthRule().threshold_share, 0.5)
