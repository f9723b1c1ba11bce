"""An exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hf_immunize.training.core.sharding import settle, split_state


class WeightAverage:
    """w̄ ← d·w̄ + (1 − d)·w after each optimizer step, with d = min(decay, (1 + n)/(10 + n)) at step n.

    The rising d forgets the start, as in TensorFlow's ExponentialMovingAverage with ``num_updates``. Only trainable
    parameters are averaged; in float32 or wider.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.count = decay, 0
        self.mean = {name: _wide(value) for name, value in _trained(model)}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights after one optimizer step."""
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        for name, value in _trained(model):
            self.mean[name] = self.mean[name].to(value.device)
            self.mean[name].lerp_(_wide(value), 1 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Give the model the averaged weights."""
        for name, value in _trained(model):
            value.copy_(self.mean[name])

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model has the averaged weights."""
        kept = {name: value.detach().clone() for name, value in _trained(model)}
        self.copy_to(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in _trained(model):
                    value.copy_(kept[name])

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, as tensors."""
        return {"count": torch.tensor(self.count)} | {f"mean.{name}": value for name, value in self.mean.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what ``state`` returned."""
        self.count = int(state["count"])
        found = {name.removeprefix("mean."): v.clone() for name, v in state.items() if name.startswith("mean.")}
        self.mean = split_state(found, self.mean)


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    settle(model)
    return ((name, value) for name, value in model.named_parameters() if value.requires_grad)


def _wide(value: Tensor) -> Tensor:
    return value.detach().to(torch.promote_types(value.dtype, torch.float32)).clone()
