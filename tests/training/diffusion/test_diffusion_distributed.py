"""Two processes and one give the same gradient on the same global batch."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
import torch
from denoiser_builders import FAMILIES
from launching import run_script
from safetensors.torch import load_file

SCRIPT = Path(__file__).parent / "global_diffusion_step.py"


def run(output: Path, processes: int) -> dict[str, torch.Tensor]:
    run_script(SCRIPT, str(output), str(processes), processes=processes)
    return load_file(output)


@pytest.mark.slow
def test_one_and_two_processes_give_the_same_gradient_in_every_case(tmp_path):
    one, two = (run(tmp_path / f"{count}.safetensors", count) for count in (1, 2))
    assert one.keys() == two.keys()
    error, size = defaultdict(float), defaultdict(float)
    for name, truth in one.items():
        case = name.rsplit("/", 1)[0]
        error[case] += float((two[name] - truth).square().sum())
        size[case] += float(truth.square().sum())
    assert {case.split("/")[0] for case in size} == set(FAMILIES)
    for case in size:
        assert size[case] > 0
        assert (error[case] / size[case]) ** 0.5 <= 1e-8, case
    assert len({round(value, 12) for value in size.values()}) == len(size), "two cases gave one gradient"
