"""Presets by name, copied whole or not at all."""

from __future__ import annotations

import pytest

from hf_immunize.errors import ConfigError, RunMismatchError
from hf_immunize.stages import recipes


def test_names_that_are_no_preset_and_files_that_are_somebody_elses(tmp_path):
    assert {"digits-vit", "mnist-diffusion", "linear-mnist-pairs"} <= set(recipes.find_presets())
    with pytest.raises(ConfigError, match=r"expected presets in \[.*'digits-vit'.*got \['poems'\]"):
        recipes.copy_presets(tmp_path, ["poems"])
    first = recipes.copy_presets(tmp_path, ["linear-mnist-pairs"])
    assert tmp_path / "recipes" / "linear-mnist-pairs" / "linear.yaml" in first
    assert recipes.copy_presets(tmp_path, ["linear-mnist-pairs"]) == first, "the same files may be copied again"
    (tmp_path / "recipes" / "attack.py").write_text("mine")
    before = sorted((tmp_path / "recipes").rglob("*"))
    with pytest.raises(RunMismatchError, match="expected no other file of that name, got .*attack.py and 0 more"):
        recipes.copy_presets(tmp_path, ["digits-vit"])
    assert sorted((tmp_path / "recipes").rglob("*")) == before
    assert (tmp_path / "recipes" / "attack.py").read_text() == "mine"
