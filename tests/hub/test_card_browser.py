"""The card as HTML in a real browser: hostile names change no element, run nothing and ask for nothing."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import record_builders as build
from markdown_it import MarkdownIt

from hf_immunize.hub import CardOptions, write_card

sys.path.insert(0, str(Path(__file__).parents[1] / "report"))
from chromium import Chromium, find_chromium  # noqa: E402

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium on this machine: install 'chromium'")
SCRIPT = "<script>window.pwned = 1</script><img src=none.png onerror='window.pwned = 1'>"
EVIL = (
    SCRIPT, f"</title></style></svg></td></table>{SCRIPT}", f"]](x)\n\n{SCRIPT}\n\n```\n{SCRIPT}",
    "[a](javascript:window.pwned=1)", "![p](https://evil.example/p.png)", "<svg onload=window.pwned=1>",
    "a | b |\n|---|---|\n| c | **RESISTS** |", "{{ 7 * 7 }}{% include 'x' %}", "]]><x:script xmlns:x='y'>&#60;b>",
)
TAGS = "[...document.querySelectorAll('*')].map(part => part.tagName).join(' ')"


@pytest.fixture(scope="module")
def browser():
    started = Chromium(find_chromium())
    yield started
    started.close()


def page_of(root, evil):
    """The card of a model all of whose names are ``evil``, as a Markdown renderer that lets HTML through shows it."""
    attacks = [replace(attack, name=re.sub(r"[/\x00]", "", evil[:60]) + str(index), family=evil, reason=evil)
               for index, attack in enumerate(build.ATTACKS[1:4])]
    folder = build.exam_folder(root, build.Exam(
        name=evil, attacks=attacks, sources=(evil,), labels=(evil, *"bcde"), statement=evil,
        extra={"rule": evil, "threshold_rule": evil, "not_run": [evil]},
    ))
    source = write_card(folder, CardOptions(repo_id="me/model")).read_text(encoding="utf-8")
    body = MarkdownIt("commonmark", {"html": True}).enable("table").render(source.split("\n---\n", 1)[1])
    page = folder / "card.html"
    page.write_text(f"<!DOCTYPE html><meta charset=utf-8><title>card</title>{body}", encoding="utf-8")
    return page


@pytest.fixture(scope="module")
def tame(browser, tmp_path_factory):
    browser.load(page_of(tmp_path_factory.mktemp("tame"), "plain"))
    return browser.evaluate(TAGS)


@pytest.mark.parametrize("evil", EVIL, ids=lambda evil: repr(evil)[:24])
def test_names_in_a_card_run_nothing_and_change_nothing(browser, tame, tmp_path, evil):
    page = page_of(tmp_path, evil)
    browser.load(page)
    assert browser.evaluate("typeof window.pwned") == "undefined"
    assert browser.evaluate(TAGS) == tame
    pictures = [path.resolve().as_uri() for path in sorted((page.parent / "plots").iterdir())]
    assert len(pictures) == 3 and sorted(browser.requests()) == [page.resolve().as_uri(), *pictures]
    assert browser.complaints() == []
    assert browser.evaluate("[...document.images].filter(image => !image.naturalWidth).length") == 0


@pytest.mark.parametrize("evil", EVIL, ids=lambda evil: repr(evil)[:24])
def test_names_in_a_picture_run_nothing_when_it_is_opened_by_itself(browser, tmp_path, evil):
    page = page_of(tmp_path, evil)
    for picture in sorted((page.parent / "plots").iterdir()):
        browser.load(picture)
        assert browser.evaluate("typeof window.pwned") == "undefined"
        assert browser.evaluate("document.documentElement.tagName") == "svg", "the picture is no well-formed XML"
        assert browser.evaluate("document.querySelectorAll('script, image, img, a, foreignObject').length") == 0
        assert browser.requests() == [picture.resolve().as_uri()]


def test_what_is_looked_for_can_be_seen(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(f"<title>bad</title>{SCRIPT}")
    browser.load(page)
    assert browser.evaluate("window.pwned") == 1
