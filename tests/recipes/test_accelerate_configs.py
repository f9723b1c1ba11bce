"""Every hardware file means to accelerate what its README says."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType

FOLDER = Path(__file__).parents[2] / "recipes" / "accelerate"
MEANT = {"cpu": (1, True), "cpu-2": (2, True), "gpu": (1, False), "gpu-2": (2, False)}
"""Processes, and whether they run on the CPU."""


def test_each_file_is_described_and_none_is_missing():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(MEANT)
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}.yaml`" in page for name in MEANT)


@pytest.mark.parametrize("name", MEANT)
def test_accelerate_reads_the_file(name):
    processes, cpu = MEANT[name]
    loaded = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert isinstance(loaded, ClusterConfig)
    assert (loaded.num_processes, loaded.use_cpu) == (processes, cpu)
    assert loaded.distributed_type == (DistributedType.MULTI_GPU if processes > 1 else DistributedType.NO)
    assert not loaded.fsdp_config and not loaded.deepspeed_config and not loaded.dynamo_config


@pytest.mark.parametrize("name", MEANT)
def test_the_launcher_starts_as_many_processes(name, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    words = ["--config_file", str(FOLDER / f"{name}.yaml"), "immunize.py"]
    options, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    processes, cpu = MEANT[name]
    assert (options.num_processes, options.use_cpu) == (processes, cpu)
    assert options.multi_gpu == (processes > 1) and not options.use_fsdp and not options.use_deepspeed
    assert options.mixed_precision == "no"
