"""Learning-rate schedules of diffusers by name, refused where they would ignore what they are told."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.optimization import SchedulerType, get_scheduler

from hf_immunize.errors import ConfigError

_NAMES = sorted(kind.value for kind in SchedulerType if kind is not SchedulerType.PIECEWISE_CONSTANT)


def schedule_of(name: str, optimizer: torch.optim.Optimizer, *, warmup_steps: int, steps: int) -> Any:
    """A schedule of ``diffusers.optimization``.

    Raises:
        ConfigError: an unknown name, piecewise_constant (which needs rules of its own), or warm-up of a schedule that
            has none.
    """
    if name not in _NAMES:
        raise ConfigError(f"expected a learning-rate schedule in {_NAMES}, got {name!r}.")
    if warmup_steps and name == "constant":
        raise ConfigError(
            f"expected no warm-up of a constant learning rate, got {warmup_steps} steps: use constant_with_warmup."
        )
    return get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=steps)
