"""The site: every page is in the navigation, every link leads somewhere, and references tell of all that is public."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import os
import pkgutil
import re
import subprocess
import sys
from functools import cache
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import pytest
import yaml

import hf_immunize

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
MADE = DOCS / "reference" / "cli.md"
"""The page whose headings the build makes."""
PAGES = sorted(path for path in DOCS.rglob("*.md"))
LINK = re.compile(r"(?<!`)!?\[[^\]]*\]\(([^)\s]+)\)")


class Loader(yaml.SafeLoader):
    """mkdocs.yml may hold tags of Python."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)
SITE = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)


def leaves(nav: list) -> list[str]:
    return [leaf for entry in nav for value in entry.values()
            for leaf in (leaves(value) if isinstance(value, list) else [value])]


def test_every_page_is_in_the_navigation_once():
    named = leaves(SITE["nav"])
    there = {path.relative_to(DOCS).as_posix() for path in [*PAGES, *DOCS.rglob("*.ipynb")]}
    assert len(named) == len(set(named)) and len(named) > 18
    assert set(named) == there, set(named) ^ there


def anchors(path: Path) -> set[str]:
    """Ids of the headings, as both GitHub and the site make them."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
    heads = re.findall(r"^#+ (.+)$", text, flags=re.M)
    plain = [re.sub(r"[^\w\s-]", "", re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", head)).strip().lower() for head in heads]
    return {re.sub(r"\s+", "-", head) for head in plain}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(DOCS).as_posix())
def test_every_link_leads_to_a_file_and_a_heading(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
    for target in LINK.findall(text):
        if re.match(r"https?:|mailto:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.is_file(), f"{path.name}: {target}"
        if anchor and there != MADE:
            assert anchor in anchors(there), f"{path.name}: {target} among {sorted(anchors(there))}"


def test_the_pages_ask_for_nothing_from_elsewhere():
    assert SITE["theme"]["font"] is False
    for path in PAGES:
        for source in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
            assert not source.startswith("http"), (path.name, source)


def test_the_python_reference_has_every_public_name_and_each_can_be_imported():
    told = (DOCS / "reference" / "python.md").read_text(encoding="utf-8")
    named = {line.rpartition(".")[2]: line for line in re.findall(r"^::: (\S+)$", told, flags=re.M)}
    assert set(hf_immunize.__all__) - {"__version__"} <= set(named), set(hf_immunize.__all__) - set(named)
    for page in (DOCS / "reference").glob("*.md"):
        for whole in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), flags=re.M):
            assert pkgutil.resolve_name(whole) is not None
    for name, whole in named.items():
        if name in hf_immunize.__all__:
            module = importlib.import_module(whole.rpartition(".")[0])
            assert getattr(module, name) is getattr(hf_immunize, name), name


@pytest.fixture(scope="module")
def tools():
    """The programs of docs/tools that need no more than the package; the command line's page is made once."""
    sys.path.insert(0, str(DOCS / "tools"))
    found = {name: importlib.import_module(name) for name in ("cli_page", "hooks", "pictures")}
    found["cli_page"].page = found["hooks"].cli_page = cache(found["cli_page"].page)
    yield found
    sys.path.remove(str(DOCS / "tools"))


def test_the_command_line_page_has_every_verb_and_every_option_of_its_own(tools):
    from hf_immunize.commands.verbs import STAGES
    from hf_immunize.stages.attack import AttackOptions
    from hf_immunize.stages.certify import CertifyOptions
    from hf_immunize.training import ImmunizationConfig

    page = tools["cli_page"].page()
    parts = dict(re.findall(r"^## hf-immunize (\w+)\n(.*?)(?=^## |\Z)", page, flags=re.S | re.M))
    assert set(STAGES) | {"verify", "show", "report", "publish", "keygen"} <= set(parts)
    for verb, kind in (("attack", AttackOptions), ("certify", CertifyOptions), ("immunize", ImmunizationConfig)):
        for field in dataclasses.fields(kind):
            assert not field.init or re.search(rf"`(--)?{field.name}`", parts[verb]), (verb, field.name)
    own = re.search(r"\| `--max_primary_drop` \| (.+?) \|", parts["immunize"])[1]
    assert own.startswith(ImmunizationConfig.__dataclass_fields__["max_primary_drop"].metadata["help"][:30])
    assert "`--strength`" in parts["immunize"] and "| `--adam_beta1` |" not in parts["immunize"]
    assert "Refused: expected a task of classes or concepts to pretrain on" in parts["pretrain"]
    for line in page.splitlines():
        assert not line.startswith("| `") or len(re.findall(r"(?<!\\)\|", line)) in (3, 4), line


def test_the_pictures_are_those_of_the_certificates_as_they_are_now(tools):
    for name, drawn in tools["pictures"].pictures().items():
        kept = (DOCS / "pictures" / name).read_text(encoding="utf-8")
        assert kept == drawn, f"python docs/tools/pictures.py writes another {name}"
        assert "http" not in kept.replace("http://www.w3.org/2000/svg", "")


def test_a_link_out_of_the_docs_goes_to_the_repository_or_becomes_a_name(tools):
    hooks = tools["hooks"]
    text = "[a](../recipes/x.md#y) [b](b.md) [c](https://c.org) ![d](pictures/d.png)"
    page = PurePosixPath("training.md")
    assert hooks.outward(text, page, "https://r.org/it") == text.replace(
        "../recipes/x.md#y", "https://r.org/it/blob/main/recipes/x.md#y")
    made = SimpleNamespace(file=SimpleNamespace(src_uri="reference/cli.md"))
    assert "## hf-immunize attack" in hooks.on_page_markdown("stub", made, None, None)
    assert hooks.outward(text, page, "") == text.replace("[a](../recipes/x.md#y)", "a (`recipes/x.md`)")


@pytest.mark.slow
def test_the_site_is_built_strictly_and_needs_no_network(tmp_path):
    """A page of the built site names no address from which a browser would fetch something."""
    if importlib.util.find_spec("material") is None:
        pytest.skip("mkdocs-material is not installed: pip install hf_immunize[docs]")
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
                          cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 18
    for page in pages:
        html = page.read_text(encoding="utf-8")
        fetched = re.findall(r"<(?:script|img|iframe|source)[^>]+\bsrc=\"(https?://[^\"]+)", html)
        fetched += re.findall(r"<link[^>]+rel=\"(?:stylesheet|preload|preconnect)\"[^>]+href=\"(https?://[^\"]+)", html)
        fetched += re.findall(r"<link[^>]+href=\"(https?://[^\"]+)\"[^>]+rel=\"(?:stylesheet|preload|preconnect)", html)
        assert not fetched, (page.name, fetched)
    index = json.loads((tmp_path / "site" / "search" / "search_index.json").read_text(encoding="utf-8"))
    assert any("hf-immunize attack" in entry["title"] for entry in index["docs"])
