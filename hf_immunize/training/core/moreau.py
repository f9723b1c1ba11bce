"""The simulated attack through a Moreau envelope: what the attacker reaches when he is held near the defended weights.

ResAlign (2025, NeurIPS) takes for the attacked weights the minimum of the harmful loss with a proximal term, which has
a derivative without the attacker's path:

    φ*(θ) = argmin_φ L_H(φ) + ‖φ − θ‖²/2γ      φ* = θ − γ∇L_H(φ*),   ∂φ*/∂θ = (I + γ∇²L_H(φ*))⁻¹

    H(θ) = relu(c − L_H(φ*; B'))      ∇H = (I + γ∇²L_H(φ*))⁻¹ g,   g = −1[L_H < c] ∇L_H(φ*; B')

Here φ* is what K steps of the attacker's optimizer on the proximal loss reach, γ is K times his rate, what K plain
steps amount to, and the system is solved by Richardson's iteration, v ← g − γ∇²L_H v from v = g (the first-order
gradient), which ends early where γ∇²L_H does not contract. A Hessian times v is a central difference of two gradients:
no second derivative is taken, so fused attention is safe. K + 1 + 2·``SOLVES`` gradients a step at most.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_immunize.errors import ConfigError
from hf_immunize.training.core.distributed import average_with
from hf_immunize.training.core.habits import Habits, habits_of
from hf_immunize.training.core.simulated import SimulatedAttack, gradient_of
from hf_immunize.training.core.weight_terms import AttackedTask, WeightTerm

SOLVES = 3
"""Most iterations of the linear solve."""


class MoreauAttack(SimulatedAttack):
    """H and its gradient through the envelope; see ``SimulatedAttack`` for what is the same.

    Args:
        nearness: γ; steps times rate if not given.
        solves: most iterations of the linear solve.

    Raises:
        ConfigError: LoRA factors, which start at zero wherever θ is: the proximal term does not tie them to it.
    """

    def __init__(
        self, task: AttackedTask, *, steps: int, habits: Habits, rank: int = 0, nearness: float | None = None,
        solves: int = SOLVES,
    ):
        if rank:
            raise ConfigError(f"expected attacker_rank=0 for resalign_moreau, got {rank}: factors are not held near "
                              "the defended weights. Leave it out, or choose simulated_attack.")
        super().__init__(task, steps=steps, habits=habits, rank=0)
        self._nearness, self._solves = nearness, solves

    def gradient(self, model: nn.Module, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """H and its gradient at the weights of ``model``, by parameter name; equal on every rank."""
        self._start(model, step)
        trained = self._attacker.trained
        near = self._nearness or self._steps * self._habits.draw(self._task.seed, step)[1]
        self._approach(step, near)
        value = self._harm(step)
        slopes = [gradient_of(parameter).clone() for parameter in trained]
        found = self._solve(step, slopes, near) if any(bool(slope.any()) for slope in slopes) else slopes
        self._attacker.clear()
        return value, self._attacker.by_name(dict(zip(trained, found, strict=True)))

    def _approach(self, step: int, near: float) -> None:
        """Leave φ*, as far as K steps go, in the attacker."""
        trained = self._attacker.trained
        start, optimizer = [parameter.detach().clone() for parameter in trained], self._fresh_optimizer(step)
        for attack_step in range(self._steps):
            self._backward(step, attack_step)
            for parameter, first in zip(trained, start, strict=True):
                gradient_of(parameter).add_(parameter.detach() - first, alpha=1 / near)
            optimizer.step()

    def _harm(self, step: int) -> Tensor:
        """H at φ*; g is left in the attacker."""
        if self._task.harm is not None:
            value = self._backward_here(step, self._steps, self._task.harm)
            return average_with([gradient_of(parameter) for parameter in self._attacker.asked], value)
        loss = self._backward(step, self._steps)
        for parameter in self._attacker.asked:
            gradient_of(parameter).mul_(-1.0 if float(loss) < self.ceiling else 0.0)
        return torch.relu(self.ceiling - loss)

    def _solve(self, step: int, wanted: list[Tensor], near: float) -> list[Tensor]:
        """(I + γ∇²L_H)⁻¹ times ``wanted``, by Richardson's iteration while it comes closer."""
        found, last = [part.clone() for part in wanted], float("inf")
        for _ in range(self._solves):
            turned = self._hessian(step, found)
            after = [g - near * h for g, h in zip(wanted, turned, strict=True)]
            change = float(_norm([x - y for x, y in zip(after, found, strict=True)]))
            if not change < last or (last == float("inf") and change >= float(_norm(wanted))):
                break
            found, last = after, change
        return found

    @torch.no_grad()
    def _hessian(self, step: int, direction: list[Tensor]) -> list[Tensor]:
        """∇²L_H(φ*) times a direction, of the rows of the attacker's last step, by a central difference."""
        trained = self._attacker.trained
        kept = [parameter.detach().clone() for parameter in trained]
        length = torch.finfo(trained[0].dtype).eps ** (1 / 3) * (1 + float(_norm(kept))) / float(_norm(direction))
        ends = []
        for sign in (1, -1):
            for parameter, start, part in zip(trained, kept, direction, strict=True):
                parameter.copy_(start + sign * length * part)
            self._backward(step, self._steps - 1)
            ends.append([gradient_of(parameter).clone() for parameter in trained])
        torch._foreach_copy_([*trained], kept)
        return [(up - down) / (2 * length) for up, down in zip(*ends, strict=True)]


def _norm(parts: list[Tensor]) -> Tensor:
    """The norm of all tensors together, in float64."""
    squares = [torch.linalg.vector_norm(part, dtype=torch.float64).square() for part in parts]
    return torch.stack(squares).sum().sqrt()


def _build(task: AttackedTask, args: Any) -> MoreauAttack:
    return MoreauAttack(task, steps=args.attacker_steps, habits=habits_of(args), rank=args.attacker_rank)


RESALIGN_MOREAU = WeightTerm("harmful_moreau_attack", _build)
