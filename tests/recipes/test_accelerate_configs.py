"""Every hardware file means to accelerate, and to the trainers, what its README says."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env

from hf_immunize.training.core.launching import sharding_plugin

FOLDER = Path(__file__).parents[2] / "recipes" / "accelerate"
MEANT = {
    "cpu": (1, 1, True, False), "cpu-2": (2, 1, True, False), "cpu-2-fsdp": (2, 1, True, True),
    "gpu": (1, 1, False, False), "gpu-2": (2, 1, False, False), "gpu-8": (8, 1, False, False),
    "gpu-8-fsdp": (8, 1, False, True), "nodes-2x8": (16, 2, False, False), "nodes-2x8-fsdp": (16, 2, False, True),
}  # fmt: skip
"""Processes, machines, whether they run on the CPU, and whether weights are split."""


def validated(words: list[str], monkeypatch):
    """What the launcher makes of its command line, on a machine with eight GPUs."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    options, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    return options


def test_each_file_is_described_and_none_is_missing():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(MEANT)
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}.yaml`" in page for name in MEANT) and "`slurm.sh`" in page


@pytest.mark.parametrize("name", MEANT)
def test_accelerate_reads_the_file(name):
    processes, machines, cpu, split = MEANT[name]
    loaded = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert isinstance(loaded, ClusterConfig)
    assert (loaded.num_processes, loaded.num_machines, loaded.use_cpu) == (processes, machines, cpu)
    whole = DistributedType.MULTI_GPU if processes > 1 else DistributedType.NO
    assert loaded.distributed_type == (DistributedType.FSDP if split else whole)
    assert bool(loaded.fsdp_config) == split and not loaded.deepspeed_config and not loaded.dynamo_config


@pytest.mark.parametrize("name", MEANT)
def test_the_launcher_starts_as_many_processes(name, monkeypatch):
    options = validated(["--config_file", str(FOLDER / f"{name}.yaml"), "immunize.py"], monkeypatch)
    processes, machines, cpu, split = MEANT[name]
    assert (options.num_processes, options.num_machines, options.use_cpu) == (processes, machines, cpu)
    assert options.multi_gpu == (processes > 1 and not split) and options.use_fsdp == split
    assert not options.use_deepspeed and options.mixed_precision == "no"


@pytest.mark.parametrize("name", [name for name, meant in MEANT.items() if meant[3]])
def test_the_trainers_accept_what_the_launcher_tells_their_processes(name, monkeypatch):
    options = validated(["--config_file", str(FOLDER / f"{name}.yaml"), "immunize.py"], monkeypatch)
    for key, value in prepare_multi_gpu_env(options).items():
        if key.startswith(("FSDP_", "ACCELERATE_USE_FSDP")):
            monkeypatch.setenv(key, value)
    plugin = sharding_plugin()
    assert plugin is not None and plugin.fsdp_version == 2 and plugin.reshard_after_forward is True


@pytest.mark.parametrize("name", ["nodes-2x8", "nodes-2x8-fsdp"])
def test_the_slurm_script_starts_one_launcher_per_node(name, tmp_path, monkeypatch):
    """SLURM's commands and accelerate's are replaced by ones that tell how they were called."""
    commands = {
        "scontrol": "echo node-a; seq -f node-b%g 100000",  # more than a pipe holds
        "srun": 'shift; for node in 0 1; do SLURM_NODEID=$node "$@"; done',
        "accelerate": 'printf "%s\\n" "$@" --',
    }
    for command, body in commands.items():
        (tmp_path / command).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / command).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_ID": "41", "SLURM_JOB_NUM_NODES": "2"}
    config = str(FOLDER / f"{name}.yaml")
    done = subprocess.run(
        ["bash", str(FOLDER / "slurm.sh"), config, "recipes/immunize.py", "--objective", "opt_kappa"],
        env={**os.environ, **job, "PATH": f"{tmp_path}:{os.environ['PATH']}"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    launches = [words.strip("\n").split("\n") for words in done.stdout.split("\n--\n") if words.strip()]
    assert len(launches) == 2
    for node, words in enumerate(launches):
        assert words[0] == "launch"
        options = validated(words[1:], monkeypatch)
        assert (options.config_file, options.machine_rank, options.main_process_ip) == (config, node, "node-a")
        assert (options.num_machines, options.num_processes, options.main_process_port) == (2, 16, 20041)
        assert options.training_script == "recipes/immunize.py"
        assert options.training_script_args == ["--objective", "opt_kappa"]
        assert options.use_fsdp == name.endswith("fsdp")
