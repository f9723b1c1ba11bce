"""What README says can be done, is done."""

from __future__ import annotations

import re
from pathlib import Path

from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs_as_printed(tmp_path, monkeypatch):
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        num_labels=5,
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "my-classifier")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "my-classifier")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert ViTForImageClassification.from_pretrained(tmp_path / "immunized").config.num_labels == 5


def test_every_command_names_files_and_targets_that_exist():
    commands = [line for block in re.findall(r"```bash\n(.*?)```", README, flags=re.S) for line in block.splitlines()]
    assert len(commands) >= 6
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in commands:
        words = command.split("#")[0].split()
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, flags=re.M), command
        for word in words:
            if word.startswith("recipes/"):
                assert (ROOT / word).is_file(), command


def test_the_table_of_objectives_is_the_one_of_the_code():
    from hf_immunize.training import OBJECTIVES

    named = set(re.findall(r"^\| `(\w+)` \|", README, flags=re.M))
    assert named == set(OBJECTIVES)
