"""What docs/data.md says about sources, folders, columns, labels, splits and copies is held by the test it names."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from hf_immunize.data import TaskArguments
from hf_immunize.data.tables import TABLES
from hf_immunize.options import parse_options

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
HELD = ["Sources", "Folders of images", "Columns", "Labels", "Splits", "Near copies"]
PARTS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.S | re.M))


def claims(part: str) -> list[str]:
    rows = [line for line in PARTS[part].splitlines() if line.startswith("| ") and not line.endswith("| test |")]
    return rows + [line[2:] for line in PARTS[part].splitlines() if line.startswith("- ")]


@pytest.mark.parametrize("part", HELD)
def test_each_claim_names_a_test_that_is_there(part):
    found = claims(part)
    assert len(found) >= 3
    for claim in found:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", claim)
        assert named, claim
        for file, test in named:
            tree = ast.parse((Path(__file__).parent / file).read_text(encoding="utf-8"))
            assert test in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, (file, test)


@pytest.mark.parametrize("part", ["Harmful rows without classes", "Data larger than memory"])
def test_each_test_that_is_named_with_its_folder_is_there(part):
    named = re.findall(r"`(\w+/test_\w+\.py)::(test_\w+)`", PARTS[part])
    assert len(named) >= 5
    for file, test in named:
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        assert test in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, (file, test)


def test_the_example_is_read_as_printed(tmp_path):
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.S)
    (tmp_path / "task.yaml").write_text(block, encoding="utf-8")
    (arguments,) = parse_options((TaskArguments,), ["--config", str(tmp_path / "task.yaml")])
    assert arguments.harmful_labels == ["tank", "gun, small"] and arguments.harmful_revision == "0a1b2c3"
    assert arguments.drop_rare_classes and arguments.group_near_duplicates


def test_every_kind_of_table_is_on_the_page():
    row = next(line for line in PARTS["Sources"].splitlines() if ".ndjson" in line)
    assert set(re.findall(r"`(\.\w+)`", row)) == set(TABLES)


def test_the_readme_links_the_page():
    assert "[Your data](docs/data.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
