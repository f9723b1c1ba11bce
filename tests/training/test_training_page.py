"""docs/training.md does what it says."""

import re
from pathlib import Path

from hf_immunize.training import OBJECTIVES

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")


def test_the_objective_of_ones_own_runs_as_printed(tmp_path, monkeypatch, make_vit, make_pixels):
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    given = {"model": make_vit(), "primary": make_pixels(24), "harmful": make_pixels(80, seed=1)}
    before = {name: value.clone() for name, value in given["model"].state_dict().items()}
    try:
        exec(compile(block, "training.md", "exec"), given)
    finally:
        OBJECTIVES.pop("centroids", None)
    logged = [entry for entry in given["trainer"].state.log_history if "loss" in entry]
    assert given["trainer"].state.global_step == 20
    assert any(not value.equal(before[name]) for name, value in given["model"].state_dict().items())
    assert all("harmful_centroid_spread" in entry for entry in logged)


def test_every_option_the_page_names_exists():
    from hf_immunize import ImmunizationConfig

    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.S)
    named = re.findall(r"^(\w+):", block, flags=re.M)
    assert len(named) >= 5 and set(named) <= set(ImmunizationConfig.__dataclass_fields__)
