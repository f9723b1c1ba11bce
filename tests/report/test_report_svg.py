import math
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trace_builders import trace

from hf_immunize.report import charts, svg
from hf_immunize.report.charts import BASE, SCRATCH, Curves, Style
from hf_immunize.report.svg import Axis, Frame


@given(st.text(), st.text())
def test_element_escapes_text_and_attributes(inside, attribute):
    drawn = str(svg.element("text", inside, aria_label=attribute))
    try:
        parsed = ElementTree.fromstring(drawn)
    except ElementTree.ParseError:  # U+FFFE and U+FFFF are not XML, yet harmless in HTML
        assert any(ord(letter) & 0xFFFE == 0xFFFE for letter in inside + attribute)
        return
    assert len(parsed) == 0 and set(parsed.attrib) == {"aria-label"}


@pytest.mark.parametrize("steps", [[1], [0], [0, 1], [5, 7], [0, 1, 2000], [1, 10**6], [3, 3]], ids=str)
def test_step_axis_keeps_every_step_in_order_and_in_frame(steps):
    axis = svg.step_axis(steps)
    places = [axis.fraction(step) for step in sorted(set(steps))]
    assert places == sorted(places) and len(set(places)) == len(places)
    assert axis.ticks and all(0 <= axis.fraction(value) <= 1 for value, _ in axis.ticks)
    assert ("0" in [label for _, label in axis.ticks]) == (0 in steps)


@given(st.floats(1e-14, 1e8), st.floats(1.0, 1e12))
def test_log_axis_covers_its_range_with_few_ticks(low, ratio):
    axis = svg.log_axis(low, low * ratio)
    assert axis.low <= low * 1.001 and axis.high >= low * ratio * 0.999 and axis.low < axis.high
    assert 1 <= len(axis.ticks) <= 6


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e3))
def test_round_ticks_lie_inside(low, width):
    ticks = svg.round_ticks(low, low + width, 5)
    slack = 1e-6 * max(1, abs(low), width)
    assert 2 <= len(ticks) <= 7 or width < 1e-9 * abs(low)
    assert all(low - slack <= tick <= low + width + slack for tick in ticks)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 64, 768, 1280])
def test_count_axis_starts_at_one(count):
    ticks = [value for value, _ in svg.count_axis(count).ticks]
    assert ticks[0] == 1 and ticks == sorted(set(ticks)) and ticks[-1] <= max(count, 2)


def test_frame_puts_larger_values_higher_and_clips():
    frame = Frame(Axis(1, 1000, (), log=True), Axis(0, 100, ()))
    (left, low), (middle, _), (right, high) = frame.at(1, 0), frame.at(math.sqrt(1000), 50), frame.at(1000, 100)
    assert low > high and left == frame.left and right == frame.width - frame.right
    assert middle == pytest.approx((left + right) / 2)
    assert frame.at(5000, 120) == (right, high) and frame.at(0, -1) == (left, low)


def test_an_axis_that_a_ruined_model_would_squeeze_is_cut_where_the_base_learns_and_says_so():
    base = Curves("base", BASE, [trace([(0, 0.6), (10, 0.9)])])
    ruined = Curves("ruined", Style("series-1", "square"), [trace([(0, -8.0), (10, 0.8)])])
    near = Curves("near", Style("series-2", "square"), [trace([(0, 0.5), (10, 0.8)])])
    scratch = Curves("scratch", SCRATCH, [trace([(0, -3.0), (10, 0.7)])])
    cut = str(charts.learning_curves("lora", [base, ruined, scratch], [0.8], "R2"))
    whole = str(charts.learning_curves("lora", [base, near, scratch], [0.8], "R2"))
    alone = str(charts.learning_curves("lora", [ruined], [0.8], "R2"))
    assert "Harmful R2, % (cut at 30)" in cut and "cut at" not in whole + alone
    assert "ruined: -800% at step 0" in cut  # words keep what the picture leaves out
    assert "cut at" not in str(charts.learning_curves("lora", [base, ruined], [0.8]))
