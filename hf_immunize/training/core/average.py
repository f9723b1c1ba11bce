"""An exponential moving average of the trained weights: diffusers' ``EMAModel`` over parameters with names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hf_immunize.training.core.sharding import settle, split_like


class WeightAverage:
    """w̄ ← d·w̄ + (1 − d)·w after each optimizer step, with d = min(decay, (1 + n)/(10 + n)) at step n.

    The rising d forgets the start. Only parameters that ask for a gradient are averaged, in float32 or wider.
    ``torch.optim.swa_utils.AveragedModel`` would copy the frozen ones as well.
    """

    def __init__(self, model: nn.Module, decay: float):
        from diffusers.training_utils import EMAModel  # reads much that a run without an average does not need

        self._names = [name for name, _ in _trained(model)]
        self._ema = EMAModel(_values(model), decay=decay, update_after_step=-1)  # -1: its count starts at d(1)
        self._ema.shadow_params = [_wide(value) for value in self._ema.shadow_params]

    @property
    def mean(self) -> dict[str, Tensor]:
        """w̄ by name."""
        return dict(zip(self._names, self._ema.shadow_params, strict=True))

    @property
    def count(self) -> int:
        """Steps taken in."""
        return int(self._ema.optimization_step)

    def update(self, model: nn.Module) -> None:
        """Take in the weights after one optimizer step."""
        self._ema.step(_values(model))

    def copy_to(self, model: nn.Module) -> None:
        """Give the model the averaged weights."""
        self._ema.copy_to(_values(model))

    def restart(self, model: nn.Module) -> None:
        """Average from these weights on, as many steps as were counted."""
        for mean, value in zip(self._ema.shadow_params, _values(model), strict=True):
            mean.copy_(value.detach())

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model has the averaged weights."""
        self._ema.store(_values(model))
        self.copy_to(model)
        try:
            yield
        finally:
            self._ema.restore(_values(model))

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, as tensors."""
        means = {f"mean.{name}": value for name, value in self.mean.items()}
        return {"count": torch.tensor(self.count)} | means

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what ``state`` returned. Raises KeyError for other weights."""
        self._ema.optimization_step = int(state["count"])
        for name, value in self.mean.items():
            value.copy_(split_like(state[f"mean.{name}"], value))


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, value) for name, value in settle(model).named_parameters() if value.requires_grad)


def _values(model: nn.Module) -> list[nn.Parameter]:
    return [value for _, value in _trained(model)]


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))
