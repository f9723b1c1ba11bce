"""The cards this repository keeps are what their certificates say, rendered by this release; if not: ``make cards``."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_immunize.hub import render_card
from hf_immunize.hub.card_check import options_of, split_card
from hf_immunize.records import Certificate
from hf_immunize.report import picture_names

ROOT = Path(__file__).parent.parent
FOLDERS = sorted(path.parent for path in (ROOT / "model_cards").rglob("certificate.json"))
AGAIN = "the kept card is not what this release renders: run 'make cards' and look at the difference"


def name_of(folder):
    return folder.relative_to(ROOT / "model_cards").as_posix()


def test_the_demos_models_all_have_one_and_every_card_has_its_recipe():
    told = yaml.safe_load((ROOT / "recipes/digits-vit/run.yaml").read_text(encoding="utf-8"))
    models = {f"digits-vit/{name}" for name in told["immunize"]}
    assert len(models) >= 2 and models <= set(map(name_of, FOLDERS)), AGAIN
    for folder in FOLDERS:
        assert (ROOT / "recipes" / folder.parent.name / f"{folder.name}.yaml").is_file(), folder


@pytest.mark.parametrize("folder", FOLDERS, ids=name_of)
def test_rendered_again_it_is_the_same(folder):
    source = (folder / "README.md").read_text(encoding="utf-8")
    assert render_card(folder, options_of(*split_card(source))) == source, AGAIN


@pytest.mark.parametrize("folder", FOLDERS, ids=name_of)
def test_its_pictures_are_there_and_no_others(folder):
    source = (folder / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"^!\[.*\]\((plots/.*)\)$", source, re.M)
    kept = sorted(path.relative_to(folder).as_posix() for path in (folder / "plots").iterdir())
    assert named == kept == list(picture_names(Certificate.read(folder / "certificate.json")).values()), AGAIN


@pytest.mark.parametrize("folder", FOLDERS, ids=name_of)
def test_its_metadata_holds_the_numbers_of_its_certificate(folder):
    certificate = Certificate.read(folder / "certificate.json")
    results = {item.metric_name: item.metric_value for item in ModelCard.load(folder / "README.md").data.eval_results}
    assert results["Primary metric, percent"] == certificate.utility.immunized
    for cell in certificate.cells:
        assert results[f"Harmful accuracy after {cell.attack}, percent"] == pytest.approx(
            100 * sum(cell.subject.accuracy) / len(cell.subject.accuracy))
    accuracies = [value for name, value in results.items() if name.endswith("percent")]
    assert len(accuracies) == 1 + len(certificate.cells) and min(accuracies) > 1.0, "a share among percent"


@pytest.mark.parametrize("folder", FOLDERS, ids=name_of)
def test_it_holds_no_path_of_the_machine_it_was_made_on(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            assert not re.search(r"/(home|root|tmp|work|Users)/", path.read_text(encoding="utf-8")), path


def test_the_table_of_the_folder_names_every_card_with_its_verdict():
    table = (ROOT / "model_cards/README.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| \[(\S+)\]\(.*\| ([A-Z ]+) \|$", table, re.M))
    assert told == {name_of(folder): Certificate.read(folder / "certificate.json").overall for folder in FOLDERS}
