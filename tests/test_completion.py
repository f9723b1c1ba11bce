"""Shell completion and --help of verbs that are built when they are called."""

import pytest
from typer.testing import CliRunner

from hf_immunize.cli import app
from hf_immunize.commands.app import STAGES
from hf_immunize.commands.completion import flags_in, help_of, known_flags
from hf_immunize.stages.recipes import find_presets
from hf_immunize.stages.words import FIRST


def completed(words):
    """What bash is offered after some words."""
    environment = {"_HF_IMMUNIZE_COMPLETE": "complete_bash", "COMP_WORDS": words,
                   "COMP_CWORD": str(len(words.split(" ")) - 1)}
    return CliRunner().invoke(app, [], prog_name="hf-immunize", env=environment).output.split()


def test_verbs_flags_and_presets_are_offered():
    assert {"immunize", "init"} <= set(completed("hf-immunize i"))
    assert completed("hf-immunize immunize --obj") == ["--objective"]
    assert "--retain_images" in completed("hf-immunize attack --ret"), "of every family of tasks"
    assert {"--from", "--jobs"} <= set(completed("hf-immunize run job/run.yaml --"))
    assert completed("hf-immunize recipes digits-vit-") == ["digits-vit-smoke"]
    assert set(completed("hf-immunize recipes ")) == set(find_presets())
    assert completed("hf-immunize plan job/") == [], "the shell then offers files"


@pytest.mark.parametrize("verb", STAGES)
def test_the_list_of_flags_that_ships_is_what_help_says(verb):
    shown = flags_in(help_of(verb))
    assert len(shown) >= 2 and shown <= set(known_flags()[verb]), "run python -m hf_immunize.commands.completion"
    if verb not in FIRST:
        assert shown == set(known_flags()[verb]), "run python -m hf_immunize.commands.completion"


@pytest.mark.parametrize("verb", FIRST)
def test_help_begins_with_the_options_that_matter(verb):
    """About ten of them, before any section, each of them once; then all others."""
    told = help_of(verb)
    first, *others = told.split("\n\n")[2:]
    shown = sorted(flags_in(first))
    assert first.startswith("Options that matter most") and 8 <= len(shown) <= 12, shown
    assert len(others) >= 2 and not flags_in(told.partition(others[0])[2]) & set(shown)
