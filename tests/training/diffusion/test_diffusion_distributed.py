"""Two processes and one give the same gradient on the same global batch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import torch
from denoiser_builders import FAMILIES
from safetensors.torch import load_file

SCRIPT = str(Path(__file__).parent / "global_diffusion_step.py")


def run(output: Path, processes: int) -> dict[str, torch.Tensor]:
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": paths,
    }
    words = [*launch, SCRIPT, str(output), str(processes)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(output)


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
