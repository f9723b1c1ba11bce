"""What ``accelerate launch`` and TrainingArguments ask of several devices: how to shard, and what is refused."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin

from hf_immunize.errors import ConfigError

_ASKED = "ACCELERATE_USE_FSDP"
"""What ``accelerate launch`` sets for a configuration with FSDP."""


def leave_processes() -> None:
    """Meet the other processes and end the process group; nothing happens in a lone process.

    Call it last, when trainers are out of scope: gloo's threads live as long as an object that refers to the group,
    and one that still holds a tensor when the interpreter is taken down aborts a process whose work is done.
    """
    if dist.is_available() and dist.is_initialized():
        gc.collect()  # wrapped models refer to themselves
        dist.barrier()
        dist.destroy_process_group()


def asked_of_launcher() -> bool:
    """Whether ``accelerate launch`` was told to use FSDP."""
    return _is_set(_ASKED)


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes", "y", "on", "t")


def refuse_deepspeed_of(where: str | None = None) -> None:
    """Raise ConfigError for DeepSpeed that was asked for ``where``, or by ``accelerate launch``."""
    if where is None and _is_set("ACCELERATE_USE_DEEPSPEED"):
        where = "from accelerate's launcher or configuration file"
    if where is not None:
        raise ConfigError(
            f"expected no DeepSpeed, got it {where}: its engine runs backward on its own and has not been shown to "
            "give the gradient of the global batch. Use DDP or FSDP2."
        )


def sharding_plugin(options: Mapping[str, Any] | None = None) -> FullyShardedDataParallelPlugin | None:
    """How to shard, from ``options`` (TrainingArguments' fsdp) or else from the launcher; None where nobody asked.

    Raises:
        ConfigError: FSDP1, or an option of FSDP2 that cannot be kept or was never tried, with what to use instead.
    """
    if options is None and not asked_of_launcher():
        return None
    version = int((options or {}).get("fsdp_version", os.environ.get("FSDP_VERSION", "1")))
    if version != 2:
        raise ConfigError(
            f"expected fsdp_version 2, got {version}: FSDP1 flattens weights, and features, averages and checkpoints "
            "need them by name. Set fsdp_version: 2 in accelerate's configuration."
        )
    plugin = FullyShardedDataParallelPlugin(**(options or {}))
    refused = {
        "fsdp_cpu_ram_efficient_loading": (plugin.cpu_ram_efficient_loading, "other ranks would read features of an "
                                           "empty model before it is sharded. Set it to false"),
        "fsdp_offload_params": (type(plugin.cpu_offload).__name__ != "OffloadPolicy", "never tried. Set it to false"),
        "fsdp_activation_checkpointing": (plugin.activation_checkpointing, "it renames the modules. Use the trainer's "
                                          "own: activation_checkpointing, or gradient_checkpointing for diffusion"),
        "fsdp_ignored_modules": (plugin.ignored_modules, "ranks would drift apart there. Leave it out"),
    }  # fmt: skip
    for name, (on, why) in refused.items():
        if on:
            raise ConfigError(f"expected FSDP2 without {name}, got it on: {why}.")
    return plugin


@contextmanager
def sharding_ourselves() -> Iterator[None]:
    """Inside, accelerate does not see that FSDP was asked for: its own would wrap the model a second time."""
    kept = os.environ.pop(_ASKED, None)
    try:
        yield
    finally:
        if kept is not None:
            os.environ[_ASKED] = kept
