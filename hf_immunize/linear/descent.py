"""Iterative methods: Algorithm 1 and the paper's baselines as one loop over three balanced terms."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from hf_immunize.errors import ConfigError, TrainingDivergedError
from hf_immunize.linalg.pencil import union_basis
from hf_immunize.linear.directions import Through, ill_direction, log_condition_direction, well_direction
from hf_immunize.linear.tasks import LinearTask

METHODS = ("algorithm1", "ill_only", "opt_kappa", "imma")


@dataclass(frozen=True)
class DescentConfig:
    """Options of the iterative methods; a step is full-batch, so ``steps_per_epoch`` only sets their number."""

    epochs: int = field(default=100, metadata={"help": "Passes over the data."})
    steps_per_epoch: int = field(default=3, metadata={"help": "Steps in a pass: rows over the batch size meant."})
    learning_rate: float = field(default=5e-3, metadata={"help": "η of the primary loss, for θ and its head."})
    strength: float = field(
        default=0.05, metadata={"help": "Auto weights: length of the primary-conditioning step relative to ‖θ‖_F."}
    )
    balance: float = field(
        default=0.1, metadata={"help": "Auto weights: length of the harmful step relative to the primary one."}
    )
    decay: bool = field(default=True, metadata={"help": "Lower auto-weighted steps linearly to zero over the run."})
    primary_weight: float | None = field(default=None, metadata={"help": "λ_P; null chooses it by norm (auto)."})
    harmful_weight: float | None = field(default=None, metadata={"help": "λ_H; null chooses it by norm (auto)."})
    cluster: float = field(
        default=0.0, metadata={"help": "R_well: eigenvalues within this fraction of the largest share the step."}
    )
    initial_noise: float = field(
        default=0.1, metadata={"help": "Start from I plus Gaussian entries of this size over √width."}
    )
    attacker_steps: int = field(default=1, metadata={"help": "IMMA: simulated attacker steps per outer step."})
    seed: int = field(default=0, metadata={"help": "Seed of the start (θ and IMMA's attacker)."})
    progress: bool = field(default=False, metadata={"help": "Show a progress bar over epochs."})

    def check(self) -> None:
        """Raise ConfigError for a value outside its range."""
        rules = {
            "epochs": self.epochs >= 1,
            "steps_per_epoch": self.steps_per_epoch >= 1,
            "learning_rate": self.learning_rate >= 0,
            "strength": 0 < self.strength < 1,
            "balance": self.balance >= 0,
            "cluster": 0 <= self.cluster < 1,
            "initial_noise": self.initial_noise >= 0,
            "attacker_steps": self.attacker_steps >= 1,
        }
        for name, held in rules.items():
            if not held:
                raise ConfigError(f"expected {name} in its range, got {getattr(self, name)}: see its help text.")


@dataclass
class _State:
    """What one run carries from step to step, in coordinates of the union of both ranges (width U)."""

    theta_UU: Tensor
    head_U: Tensor
    attacker_U: Tensor


class Descent:
    """One run of an iterative method on a pair of tasks."""

    def __init__(self, primary: LinearTask, harmful: LinearTask, config: DescentConfig):
        config.check()
        self.config, self.width = config, primary.factor.width
        self.union_DU = union_basis(primary.factor, harmful.factor)
        self._factors = [task.factor.factor_RD @ self.union_DU for task in (primary, harmful)]
        self._ranges = [task.factor.right_DR.T @ self.union_DU for task in (primary, harmful)]
        self._losses = [_Quadratic.of(task, self.union_DU) for task in (primary, harmful)]

    def run(self, method: str) -> Tensor:
        """θ (D×D) after all epochs; identity outside the union of the two ranges.

        Raises:
            ConfigError: an unknown method, or "imma" without labels on both tasks.
            TrainingDivergedError: θ stopped being finite.
        """
        if method not in METHODS:
            raise ConfigError(f"expected one of {', '.join(METHODS)}, got {method!r}.")
        if method == "imma" and any(loss is None for loss in self._losses):
            raise ConfigError("expected labels on both tasks for imma, which simulates an attacker: pass labels.")
        config, state = self.config, self._start()
        total = config.epochs * config.steps_per_epoch
        for epoch in tqdm(range(config.epochs), desc=method, unit="epoch", disable=not config.progress):
            for inner in range(config.steps_per_epoch):
                done = (epoch * config.steps_per_epoch + inner) / total
                self._step(method, state, config.strength * (1 - done if config.decay else 1.0))
        basis = self.union_DU
        eye = torch.eye(self.width, dtype=basis.dtype)
        return eye + basis @ (state.theta_UU - torch.eye(basis.shape[1], dtype=basis.dtype)) @ basis.T

    def _start(self) -> _State:
        """θ = I plus noise, the primary head at zero, IMMA's attacker at unit Gaussian entries."""
        width = self.union_DU.shape[1]
        generator = torch.Generator().manual_seed(self.config.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        theta = torch.eye(width, dtype=torch.float64) + self.config.initial_noise * normal(width, width) / width**0.5
        return _State(theta, torch.zeros(width, dtype=torch.float64), normal(width))

    def _step(self, method: str, state: _State, reach: float) -> None:
        """One step: primary loss on head and θ, then the method's two terms, all from the same θ."""
        config, theta = self.config, state.theta_UU
        length = reach * float(torch.linalg.matrix_norm(theta))
        moves: list[Tensor | None] = []
        loss = self._losses[0]
        if loss is not None:
            gradient_theta, gradient_head = loss.gradients(theta, state.head_U)
            step = config.learning_rate * gradient_theta
            moves.append(step * min(1.0, length / max(float(torch.linalg.matrix_norm(step)), 1e-300)))
            rate = min(config.learning_rate, 1 / loss.curvature(theta))
            state.head_U = state.head_U - rate * gradient_head
        well, ill = self._terms(method, state)
        moves.append(self._scaled(well, config.primary_weight, length))
        moves.append(self._scaled(ill, config.harmful_weight, length * config.balance))
        for move in moves:
            theta = theta if move is None else theta - move
        if not bool(torch.isfinite(theta).all()):
            raise TrainingDivergedError(
                f"expected a finite θ after each step of {method}, got NaN or infinity: lower learning_rate or the "
                "weights."
            )
        state.theta_UU = theta

    def _scaled(self, direction: Tensor | None, weight: float | None, length: float) -> Tensor | None:
        """ηλ·direction, or with auto weights direction scaled to ``length``."""
        if direction is None:
            return None
        if weight is not None:
            return self.config.learning_rate * weight * direction
        norm = float(torch.linalg.matrix_norm(direction))
        return direction * (length / norm) if norm > 0 else None

    def _terms(self, method: str, state: _State) -> tuple[Tensor | None, Tensor | None]:
        """(descent direction for the primary conditioning, for the harmful one) of a method."""
        if method == "imma":
            return None, self._imma(state)
        at_p, at_h = (Through.of(f, r, state.theta_UU) for f, r in zip(self._factors, self._ranges, strict=True))
        if method == "ill_only":
            return None, ill_direction(at_h, preconditioned=False)
        if method == "opt_kappa":
            return log_condition_direction(at_p), -log_condition_direction(at_h)
        return well_direction(at_p, width=self.width, cluster=self.config.cluster), ill_direction(at_h)

    def _imma(self, state: _State) -> Tensor:
        """−∇_θ of the harmful loss after simulated attacker steps, through those steps (Zheng & Yeh 2024)."""
        loss = self._losses[1]
        assert loss is not None
        theta = state.theta_UU.clone().requires_grad_(True)
        rate = 1 / loss.curvature(state.theta_UU)
        head = state.attacker_U
        for _ in range(self.config.attacker_steps):
            head = head - rate * loss.head_gradient(theta, head)
        (gradient,) = torch.autograd.grad(loss.value(theta, head), theta)
        state.attacker_U = head.detach()
        return -gradient


@dataclass(frozen=True)
class _Quadratic:
    """L(θ, w) = (wᵀθᵀKθw − 2cᵀθw)/N + const: the mean squared error through moments."""

    factor_RU: Tensor
    cross_U: Tensor
    rows: int

    @classmethod
    def of(cls, task: LinearTask, union_DU: Tensor) -> _Quadratic | None:
        if task.triangle_SD is None or task.labels_S is None or task.rows is None:
            return None
        cross = union_DU.T @ (task.triangle_SD.T @ task.labels_S)
        return cls(task.factor.factor_RD @ union_DU, cross, task.rows)

    def value(self, theta: Tensor, head: Tensor) -> Tensor:
        through = theta @ head
        return ((self.factor_RU @ through).square().sum() - 2 * self.cross_U @ through) / self.rows

    def residual(self, theta: Tensor, head: Tensor) -> Tensor:
        """½∂L/∂(θw)."""
        return (self.factor_RU.T @ (self.factor_RU @ (theta @ head)) - self.cross_U) / self.rows

    def head_gradient(self, theta: Tensor, head: Tensor) -> Tensor:
        return 2 * theta.T @ self.residual(theta, head)

    def gradients(self, theta: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
        residual = 2 * self.residual(theta, head)
        return torch.outer(residual, head), theta.T @ residual

    def curvature(self, theta: Tensor) -> float:
        """An upper bound on the head's largest curvature, 2‖Fθ‖_F²/N: rates up to its inverse are stable."""
        return 2 * float((self.factor_RU @ theta).square().sum()) / self.rows
