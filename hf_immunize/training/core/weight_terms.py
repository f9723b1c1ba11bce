"""Terms on the weights themselves: what a trainer offers them, and how their gradients enter a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_immunize.training.core.balancing import TermWeights
from hf_immunize.training.core.sharding import settle, split_like

Measure = Callable[[nn.Module, int, int], Tensor]
"""Given a model, the optimizer step and the attacker's, a scalar of this rank's rows: the same draws every time."""
Denoise = Callable[[nn.Module, int, str], tuple[Tensor, Tensor]]
"""Given a denoiser, the optimizer step and which rows (concept 'named' or 'unnamed', 'related'): answers, targets."""


@dataclass(frozen=True)
class AttackedTask:
    """The harmful task, for whoever trains copies of the model on it.

    Attributes:
        model: what is immunized.
        layers: linear layers that an attacker's LoRA factors go on.
        loss: the mean harmful loss, which the attacker descends.
        seed: of whatever else is drawn.
        features: given the same, features of this rank's rows at the head (with a graph), their labels and the number
            of classes, for attackers with a head of their own; None for models without one.
        harm: what the defender lowers at an attacked model, at least 0, where that is not relu(ceiling − loss).
        fresh: given the optimizer step, weights by name that the attacker draws anew before he starts.
        denoise: answers to noised rows, for terms of a denoiser; None for models that are none.
        tokens: shapes of embeddings that he trains beside weights, from zeros in every attack, by name.
    """

    model: nn.Module
    layers: Sequence[str]
    loss: Measure
    seed: int
    features: Callable[[nn.Module, int, int], tuple[Tensor, Tensor, int]] | None = None
    harm: Measure | None = None
    fresh: Callable[[int], Mapping[str, Tensor]] | None = None
    denoise: Denoise | None = None
    tokens: Mapping[str, Sequence[int]] = field(default_factory=dict)


class WeightObjective(Protocol):
    """One term at work in a run."""

    ceiling: float
    """Largest loss that counts; set from the base's own before the first step."""

    def gradient(self, model: nn.Module, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The value, and its gradient by parameter name; equal on every rank."""

    def to(self, device: torch.device) -> None:
        """Move whatever it holds."""

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what ``state`` returned."""


@dataclass(frozen=True)
class WeightTerm:
    """One scalar of the weights to be minimised; registered like a ``Term`` on features."""

    name: str
    build: Callable[[AttackedTask, Any], WeightObjective]
    """Given the task and the run's options, the term at work."""
    side: str = "harmful"
    full_precision: bool = False
    tells_classes_apart: bool = False
    stops_closed_form: bool = False
    sees_rows: bool = True
    """Whether it asks for the loss on harmful rows, which for a classifier need classes."""
    erases: bool = False
    """Whether it is to make the model know less at once, so that its loss on harmful rows has to rise."""
    achieves: str = "It holds up the attacker that was simulated; {other} is another one."
    """Said of a run that lowered it; ``{other}`` is an attacker that no simulated one stands for."""

    def progress(self, value: float) -> float:
        """A number that falls as the term is minimised."""
        return value


class WeightTerms:
    """Σ λ·value over the terms on weights, balanced as those on features are.

    Args:
        terms: with the objective of each.
        weight, strength, shares: see ``TermWeights``; G is the norm of the wrong-target gradient at the weights.
    """

    def __init__(
        self, terms: Mapping[WeightTerm, WeightObjective], weight: str, strength: float, shares: str | None
    ):
        self.objectives = {term.name: objective for term, objective in terms.items()}
        self.weights = TermWeights(tuple(terms), weight, strength, shares)

    def add_gradients(self, model: nn.Module, step: int) -> dict[str, Tensor]:
        """Add λ·gradient to the gradients of ``model``; values and λ for the log."""
        told: dict[str, Tensor] = {}
        found = {name: objective.gradient(model, step) for name, objective in self.objectives.items()}
        trained = {name: parameter for name, parameter in settle(model).named_parameters() if parameter.requires_grad}
        norms = {name: _norm(gradients[part] for part in trained) for name, (_, gradients) in found.items()}
        for name, weight in self.weights.of_norms(norms).items():
            value, gradients = found[name]
            for part, parameter in trained.items():
                added = split_like(weight.to(gradients[part]) * gradients[part], parameter)
                parameter.grad = added if parameter.grad is None else parameter.grad + added
            told |= {name: value, f"lambda/{name}": weight}
        return told

    def values(self, model: nn.Module) -> dict[str, float]:
        """The terms at a model, of the rows and draws of step 0."""
        was_training = model.training
        model.train()
        try:
            return {name: float(_value(objective, model)) for name, objective in self.objectives.items()}
        finally:
            model.train(was_training)

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, as tensors."""
        kept = {f"weights:{name}": value for name, value in self.weights.state().items()}
        for term, objective in self.objectives.items():
            kept |= {f"{term}:{name}": value for name, value in objective.state().items()}
        return kept

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what ``state`` returned."""

        def under(start: str) -> dict[str, Tensor]:
            return {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}

        self.weights.load_state(under("weights:"))
        for term, objective in self.objectives.items():
            objective.load_state(under(f"{term}:"))


def _value(objective: WeightObjective, model: nn.Module) -> Tensor:
    """The value alone; an objective that goes on from step to step has a way to look that changes nothing."""
    looked: Callable[[nn.Module], Tensor] | None = getattr(objective, "value", None)
    return objective.gradient(model, 0)[0] if looked is None else looked(model)


def _norm(gradients: Any) -> Tensor:
    """The norm of all tensors together, in float64, without a float64 copy of any."""
    squares = [torch.linalg.vector_norm(part, dtype=torch.float64).square() for part in gradients]
    return torch.stack(squares).sum().sqrt()
