import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_immunize.records import Interval, Side
from hf_immunize.report import text


def interval(estimate, low, high):
    return Interval(estimate=estimate, low=low, high=high, samples=3)


@pytest.mark.parametrize(
    ("value", "written"),
    [(None, "–"), (0, "0"), (9.0, "9"), (66.666, "66.7"), (1585.0, "1,585"), (0.0123, "0.0123"), (2.5e5, "2.5 × 10⁵"),
     (99_999.4, "99,999"), (3e-9, "3.0 × 10⁻⁹"), (-4.25, "-4.25")],
)
def test_numbers(value, written):
    assert text.number(value) == written


@pytest.mark.parametrize(
    ("figures", "written"),
    [
        ((12.0, 9.1, 16.2), "12× (9.1 to 17)"),
        ((12.0, 9.1, None), "12× (9.1 to open)"),
        ((12.0, None, None), "12×"),
        ((None, 66.67, None), "at least 66×"),
        ((None, None, 0.5), "at most 0.5×"),
        ((None, 2.0, 3.0), "between 2× and 3×"),
        ((None, None, None), "no figure"),
    ],
)
def test_slow_down_says_only_what_was_measured(figures, written):
    assert text.slow_down(interval(*figures)) == written


@given(st.floats(1e-3, 9e4))
def test_a_printed_lower_bound_is_never_above_the_measured_one(low):
    printed = text.slow_down(interval(None, low, None)).removeprefix("at least ").removesuffix("×")
    value = float(printed.replace(",", ""))
    assert value <= low * (1 + 1e-6)
    assert value >= low - 10 ** max(math.floor(math.log10(low)) - 1, -9) * 1.001


def test_steps_of_censored_seeds_are_not_numbers():
    some = Side(trial="t", steps_to_threshold=[30, None], accuracy=[0.8, 0.6], trials=1, diverged=0)
    none = Side(trial="t", steps_to_threshold=[None, None], accuracy=[0.5, 0.5], trials=1, diverged=0)
    lost = Side(trial=None, steps_to_threshold=[], accuracy=[], trials=1, diverged=2)
    assert text.steps(some, 2000) == "30, >2,000"
    assert text.steps(none, 2000) == "not reached in 2,000"
    assert text.steps(lost, 2000) == text.steps(None, 2000) == "–"
    assert text.accuracy(lost) is None and text.accuracy(none) == 0.5


def test_points_are_signed_and_open_bounds_are_said():
    assert text.points(interval(-0.034, -0.05, None)) == "−3.4 (−5.0 to open)"
    assert text.points(interval(0.0, -0.001, 0.001), 1.0) == "0.0 (0.0 to 0.0)"
    assert text.points(interval(None, None, None)) == "no figure"


def test_clean_removes_what_cannot_be_seen():
    assert text.clean("a\u202eb\x00c\u200bd\ne\ud800") == "abcd e"
