"""The page in a real browser: no complaint, no request, no overflow, no accessibility violation, no injection."""

import importlib.util
from pathlib import Path

import pytest
import record_builders as build
from chromium import Chromium, find_chromium
from test_report_page import HOSTILE, hostile_exam

from hf_immunize.report import render_report

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium on this machine: install 'chromium'")

OVERFLOWING = """[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, .skip, svg')
    && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(e => e.outerHTML)"""


@pytest.fixture(scope="module")
def browser():
    started = Chromium(find_chromium())
    yield started
    started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    root = tmp_path_factory.mktemp("pages")
    base = build.base_folder(root)
    learned = {"trainability": build.trainability()}
    two = [build.exam_folder(root, build.Exam(scratch=True, extra=learned)),
           build.exam_folder(root, build.Exam(name="other_model"))]
    wild_root = root / "wild"
    wild = build.exam_folder(wild_root, hostile_exam(HOSTILE))
    return {
        "two": render_report(two, base, root / "two.html"),
        "wild": render_report([wild], build.base_folder(wild_root), root / "wild.html"),
    }


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("name", ["two", "wild"])
def test_loads_without_complaint_request_or_overflow(browser, pages, name, width, dark):
    browser.resize(width, dark=dark)
    browser.load(pages[name])
    assert browser.complaints() == []
    assert browser.requests() == [pages[name].resolve().as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.evaluate(OVERFLOWING) == []
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(21, 23, 26)" if dark else "rgb(252, 252, 251)")


def test_the_console_check_can_fail(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text("<title>bad</title><script>console.error('seen'); missing()</script><img src='none.png'>")
    browser.load(page)
    assert len(browser.complaints()) >= 3
    assert len(browser.requests()) == 2


def test_charts_are_drawn_inside_their_cards(browser, pages):
    browser.resize(1280)
    browser.load(pages["two"])
    assert browser.evaluate("""[...document.querySelectorAll('svg.chart')].filter(svg => {
        const box = svg.getBoundingClientRect(), card = svg.closest('.card').getBoundingClientRect();
        return box.width < 200 || box.right > card.right || [...svg.querySelectorAll(':not(desc)')].some(part => {
            const inner = part.getBoundingClientRect();
            return inner.right > card.right + 1 || inner.left < card.left - 1;
        });
    }).map(svg => svg.getAttribute('aria-label'))""") == []


def test_a_failure_is_as_prominent_as_a_success(browser, pages):
    browser.load(pages["two"])
    sizes = browser.evaluate("""['v-fails', 'v-resists'].map(name => {
        const style = getComputedStyle(document.querySelector('td.cell .' + name));
        return [style.fontSize, style.fontWeight, style.padding, style.display, style.visibility].join();
    })""")
    assert sizes[0] == sizes[1]


def test_names_run_nothing(browser, pages):
    browser.load(pages["wild"])
    assert browser.evaluate("typeof window.pwned") == "undefined"
    assert browser.evaluate("document.querySelectorAll('script, img, iframe, object, form').length") == 0


@pytest.mark.parametrize(("width", "dark"), [(360, False), (1280, True)], ids=["narrow-light", "wide-dark"])
def test_axe_finds_no_violation(browser, pages, width, dark):
    found = importlib.util.find_spec("axe_core_python")
    if found is None:
        pytest.skip("axe-core is not installed: pip install axe-core-python")
    browser.resize(width, dark=dark)
    browser.load(pages["two"])
    browser.evaluate((Path(found.origin).parent / "axe.min.js").read_text(encoding="utf-8") + "; 0")
    violations = browser.evaluate("""axe.run(document).then(result => result.violations.map(
        rule => [rule.id, rule.nodes.length, rule.nodes[0].html.slice(0, 200), rule.nodes[0].failureSummary]))""")
    assert violations == []
