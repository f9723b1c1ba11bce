"""A term on weights from one function of the model: the short way to an objective of one's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_immunize.errors import ConfigError
from hf_immunize.training.core.sharding import is_sharded
from hf_immunize.training.core.weight_terms import AttackedTask, WeightTerm


def weight_term(name: str, measure: Callable[[nn.Module], Tensor]) -> WeightTerm:
    """A term that is a differentiable function of the model's weights alone, for ``register_objective``.

    Args:
        name: under which it is logged.
        measure: given the model, the scalar to be minimised. It is asked once per optimizer step, with gradients, on
            every rank alike; it sees no rows. What needs rows or keeps a state implements ``WeightObjective``.
    """

    def build(task: AttackedTask, options: Any) -> MeasuredWeights:
        return MeasuredWeights(name, measure)

    return WeightTerm(
        name, build, sees_rows=False, achieves="Whom a term on weights alone holds up is for the exam to say."
    )


class MeasuredWeights:
    """The term at work: its value and gradient by parameter name.

    Args:
        name: of the term, for errors.
        measure: the scalar, given the model.
    """

    ceiling = float("inf")

    def __init__(self, name: str, measure: Callable[[nn.Module], Tensor]):
        self._name, self._measure = name, measure

    def gradient(self, model: nn.Module, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The value, and its gradient at every parameter; zero where the function does not depend on it.

        Raises:
            ConfigError: a model whose weights are split over ranks, or a function that is no differentiable scalar.
        """
        if is_sharded(model):
            raise ConfigError(
                f"expected whole weights for the term {self._name!r}, got weights split over ranks: train with DDP or "
                "on one device, or implement hf_immunize.training.WeightObjective."
            )
        named = dict(model.named_parameters())
        trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
        with torch.enable_grad():
            value = self._measure(model)
        if not isinstance(value, Tensor) or value.dim() or not value.requires_grad:
            raise ConfigError(
                f"expected a differentiable scalar from the term {self._name!r}, got "
                f"{tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__}: return one number that "
                "is computed from weights that are trained (trainable_modules)."
            )
        found = torch.autograd.grad(value, list(trained.values()), allow_unused=True)
        gradients = {name: torch.zeros_like(parameter) for name, parameter in named.items()}
        gradients |= {name: one for name, one in zip(trained, found, strict=True) if one is not None}
        return value.detach(), gradients

    def to(self, device: torch.device) -> None:
        """Nothing is held."""

    def state(self) -> dict[str, Tensor]:
        """Nothing goes on from step to step."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Nothing is taken back."""
