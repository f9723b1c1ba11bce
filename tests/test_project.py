"""What surrounds the code holds together: changelog, forms, workflows, hooks, the release's own words."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import setuptools  # noqa: F401  (setup.py wants it, and it cannot be imported once others have imported distutils)
import yaml

from hf_immunize.version import __version__

ROOT = Path(__file__).parent.parent


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_workflows_run_what_anyone_can_run():
    told = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    steps = [step.get("run") for step in told["jobs"]["run"]["steps"] if "run" in step]
    assert [step["run"] for step in told["jobs"]["docs"]["steps"] if "run" in step] == ["make docs"]
    assert steps == [".ci/run"] and (ROOT / ".ci/run").is_file() and told["permissions"] == {"contents": "read"}
    release = (ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8")
    assert "make release" in release and re.search(r"^release:", (ROOT / "Makefile").read_text(), re.M)


def test_issue_forms_ask_for_something():
    forms = [path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"]
    assert len(forms) == 3
    for path in forms:
        told = yaml.safe_load(path.read_text(encoding="utf-8"))
        asked = [part for part in told["body"] if part["type"] != "markdown"]
        assert told["name"] and told["description"] and any(part["validations"]["required"] for part in asked)
        assert len({part["id"] for part in asked}) == len(asked)


def test_hooks_use_the_linter_that_is_pinned():
    told = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    pinned = re.search(r"^ruff==(.+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)[1]
    assert told["repos"][0]["rev"] == f"v{pinned}"


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_pages_name_files_that_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    rooms = "hf_immunize|tests|recipes|attacks|training|data|stages|commands|records"
    named = re.findall(rf"`((?:{rooms})/[\w./-]+)`", text)
    gone = {"recipes/pipeline.py"}
    for path in set(named) - gone:
        assert (ROOT / path).exists() or (ROOT / "hf_immunize" / path).exists(), path
    for target in re.findall(r"`make ([\w-]+)", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M), target


def test_the_version_is_told_and_a_tag_of_another_one_is_refused(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / ".ci")
    release = load(ROOT / ".ci" / "release.py")
    assert release.version() == __version__
    release.check_version(f"v{__version__}")
    with pytest.raises(SystemExit, match=f"expected the tag v{__version__} .* got v9.9.9"):
        release.check_version("v9.9.9")
    monkeypatch.setattr(release, "version", lambda: "9.9.9")
    with pytest.raises(SystemExit, match="expected a section .9.9.9. in CHANGELOG.md"):
        release.check_version("v9.9.9")


def test_links_of_the_readme_become_absolute_and_others_stay():
    setup = load(ROOT / "setup.py")
    text = "[a](docs/a.md) [b](https://b.org/x) [c](#d) ![e](plots/e.svg) [f](../g) (h)"
    assert setup.absolute(text, "https://r.org/me/it") == (
        "[a](https://r.org/me/it/blob/main/docs/a.md) [b](https://b.org/x) [c](#d) "
        "![e](https://r.org/me/it/raw/main/plots/e.svg) [f](https://r.org/me/it/blob/main/../g) (h)")
    whole = setup.absolute((ROOT / "README.md").read_text(encoding="utf-8"), "https://r.org/me/it")
    assert not re.findall(r"\]\((?!https?:|#)", whole)
    assert "](https://r.org/me/it/raw/main/docs/pictures/report.png)" in whole, "a picture has to be a file, not a page"
    assert set(setup.addresses("u")) == {"Homepage", "Source", "Issues", "Documentation", "Changelog"}


def test_the_metadata_of_a_release_has_addresses_and_of_a_clone_none(tmp_path):
    code = "import setuptools.build_meta as b, sys; print(b.prepare_metadata_for_build_wheel(sys.argv[1]))"
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "hf_immunize").mkdir()
    (tmp_path / "recipes").mkdir()
    for name in ("__init__.py", "version.py"):
        (tmp_path / "hf_immunize" / name).write_bytes((ROOT / "hf_immunize" / name).read_bytes())
    found = []
    for repository in ("", "https://r.org/me/it/"):
        out = tmp_path / f"out{len(found)}"
        out.mkdir()
        done = subprocess.run([sys.executable, "-c", code, str(out)], cwd=tmp_path, capture_output=True, text=True,
                              env={"HF_IMMUNIZE_REPOSITORY": repository, "PATH": "/usr/bin:/bin"})
        assert done.returncode == 0, done.stderr
        found.append((out / done.stdout.splitlines()[-1] / "METADATA").read_text(encoding="utf-8"))
    assert "Project-URL" not in found[0] and "](docs/method.md)" in found[0]
    assert "Project-URL: Source, https://r.org/me/it\n" in found[1]
    assert "](https://r.org/me/it/blob/main/docs/method.md)" in found[1]
    assert "Description-Content-Type: text/markdown" in found[1]


def test_what_py_typed_promises_is_what_mypy_reads():
    told = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    assert (ROOT / "hf_immunize" / "py.typed").exists()
    assert told["strict"] is True and told["files"] == ["hf_immunize"] and "exclude" not in told
    assert "ignore-without-code" in told["enable_error_code"]
    own = [part for part in told["overrides"] if "hf_immunize" in str(part["module"])]
    # these two alone are let off, and only where torch, transformers or diffusers are called
    assert [set(part) for part in own] == [{"module", "disallow_untyped_calls", "warn_return_any"}]
