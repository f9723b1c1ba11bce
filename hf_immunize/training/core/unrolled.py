"""The simulated attack with its exact gradient: through the attacker's steps, not beside them.

AdamW cannot be differentiated usefully: through its first step from zero moments the factor is eps/(|g| + eps)²,
1/eps = 10⁸ where a gradient is near 0. The attacker here repeats that step with the scale s of each tensor's gradient
as its eps, which is smooth. With φ what it trains (all weights, φ_0 = θ, or LoRA factors), g_k = ∇_φ L_H(θ, φ_{k−1};
B_k), and for every tensor of n entries

    φ_k = φ_{k−1} − u(g_k),   u(g) = η g/(|g| + s),   s = (Σ g²/n)^½,   u(0) = 0

    H(θ) = (1/K) Σ_{k=1..K} relu(c − L_H(θ, φ_k; B_{k+1}))      as in ``simulated.py``

The exact ∇H by the adjoint recursion, backwards from a_K = −(1/K) 1[L_K < c] ∇L_K, with ∇ over θ and φ together and
L_k = L_H(θ, φ_k; B_{k+1}):

    w_k = J_u(g_k)ᵀ a^φ_k = η (s a/(|g| + s)² − g/(n s) Σ a g/(|g| + s)²)      for every tensor
    a_{k−1} = a_k − ∇⟨∇_φ L_{k−1}, w_k⟩ − (1/K) 1[k > 1] 1[L_{k−1} < c] ∇L_{k−1}

and ∇H = a_0 on θ. The first-order gradient leaves the second term out. One Hessian-vector product per step of the
attacker; no more than one step's graph is alive, beside K copies of φ. In the sense of MAML (Finn et al. 2017, equation
1 with several inner steps), without its first-order approximation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_immunize.errors import ModelError
from hf_immunize.training.core.distributed import average_over_ranks, average_with
from hf_immunize.training.core.simulated import SimulatedAttack, gradient_of


class UnrolledAttack(SimulatedAttack):
    """H and its exact gradient; arguments as for ``SimulatedAttack``. Attention runs on PyTorch's math kernel.

    Raises:
        ModelError: at the first step, for a model with operations whose second derivative cannot be trusted.
    """

    _checked = False
    _rate = 0.0

    @torch.no_grad()
    def gradient(self, model: nn.Module, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """H and its exact gradient at the weights of ``model``, by parameter name; equal on every rank."""
        self._start(model, step)
        self._rate = self._habits.draw(self._task.seed, step)[1]
        with sdpa_kernel(SDPBackend.MATH):
            path = self._attack(step)
            loss = self._backward(step, self._steps)
            value = self._harm(loss)
            everything, trained = self._attacker.asked, self._attacker.trained
            adjoint = {p: gradient_of(p) * self._slope(loss) for p in everything}
            self._attacker.clear()
            for attack_step in reversed(range(self._steps)):
                torch._foreach_copy_([*trained], path.pop())
                loss, gradient, pulled = self._pull_back(step, attack_step, adjoint)
                for parameter in everything:
                    adjoint[parameter] -= pulled[parameter]
                if attack_step > 0:
                    value = value + self._harm(loss)
                    for parameter in everything:
                        adjoint[parameter] += gradient[parameter] * self._slope(loss)
        return value, self._attacker.by_name(adjoint)

    def _harm(self, loss: Tensor) -> Tensor:
        return torch.relu(self.ceiling - loss) / self._steps

    def _slope(self, loss: Tensor) -> Tensor:
        return -(loss < self.ceiling).to(loss) / self._steps

    def _attack(self, step: int) -> list[list[Tensor]]:
        """Leave φ_K in the attacker; φ_0 to φ_{K−1}."""
        path = []
        for attack_step in range(self._steps):
            path.append([parameter.clone() for parameter in self._attacker.trained])
            self._backward(step, attack_step)
            for parameter in self._attacker.trained:
                parameter.sub_(update(gradient_of(parameter), self._rate))
        return path

    def _pull_back(
        self, step: int, attack_step: int, adjoint: dict[nn.Parameter, Tensor]
    ) -> tuple[Tensor, dict[nn.Parameter, Tensor], dict[nn.Parameter, Tensor]]:
        """L, ∇L and ∇⟨∇_φ L, J_uᵀ a⟩ at the attacker's weights, each a mean over ranks."""
        everything = list(adjoint)
        with torch.enable_grad():
            loss = self._loss(step, attack_step)
            if not self._checked:
                refuse_opaque(loss, "attacker_second_order")
                self._checked = True
            graphs = torch.autograd.grad(loss, everything, create_graph=True, materialize_grads=True)
            mean = [part.detach().clone() for part in graphs]
            average_over_ranks(mean)
            gradient = dict(zip(everything, mean, strict=True))
            told = dict(zip(everything, graphs, strict=True))
            directions = {p: update_vjp(gradient[p], adjoint[p], self._rate) for p in self._attacker.trained}
            product = torch.stack([(told[p] * direction).sum() for p, direction in directions.items()]).sum()
            pulled = list(torch.autograd.grad(product, everything, materialize_grads=True))
        loss = average_with(pulled, loss)
        return loss, gradient, dict(zip(everything, pulled, strict=True))


def update(gradient: Tensor, rate: float) -> Tensor:
    """u(g) of the module's docstring, for one tensor; 0 for a gradient of zeros, or too small to be squared."""
    largest, alive = _largest(gradient)
    g = gradient / largest
    return rate * torch.where(alive, g / (g.abs() + g.square().mean().sqrt()), 0.0)


def update_vjp(gradient: Tensor, wanted: Tensor, rate: float) -> Tensor:
    """J_u(g)ᵀ a for one tensor g and a of its shape, as J_u(g/m)ᵀ a/m with m = max |g|; 0 where u is."""
    largest, alive = _largest(gradient)
    g = gradient / largest
    scale = g.square().mean().sqrt()
    scaled = wanted / (g.abs() + scale).square()
    found = scale * scaled - (scaled * g).mean() / scale * g
    return torch.where(alive, found * (rate / largest), 0.0)


def _largest(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """max |g| and whether its square is a number of full precision; 1 where not."""
    largest = gradient.abs().max()
    alive = largest > math.sqrt(torch.finfo(gradient.dtype).tiny)
    return torch.where(alive, largest, 1.0), alive


def hessian_times(
    measure: Callable[[], Tensor], parameters: Sequence[nn.Parameter], direction: Sequence[Tensor], what: str
) -> list[Tensor]:
    """∇²L times a direction, of a loss at some parameters; attention runs on PyTorch's math kernel.

    Args:
        measure: computes L.
        what: the option or objective that needs it, for the error of ``refuse_opaque``.
    """
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        loss = measure()
        refuse_opaque(loss, what)
        slopes = torch.autograd.grad(loss, [*parameters], create_graph=True, materialize_grads=True)
        product = torch.stack([(x * y).sum() for x, y in zip(slopes, direction, strict=True)]).sum()
        found = torch.autograd.grad(product, [*parameters], materialize_grads=True)
    return [part.contiguous() for part in found]


def refuse_opaque(result: Tensor, what: str) -> None:
    """Raise ModelError for a graph with operations that may have no second derivative, or a wrong one.

    Args:
        what: the option or objective that needs it.
    """
    if opaque := sorted(opaque_operations(result)):
        raise ModelError(
            f"expected a model of PyTorch's own operations for {what}, got {', '.join(opaque)}: "
            "their backward may have no second derivative, or a wrong one. Reset the attention backend "
            "(of a denoiser: model.reset_attention_backend(), model.set_default_attn_processor()), do not compile "
            f"the model, or leave {what} off."
        )


def opaque_operations(result: Tensor) -> set[str]:
    """Names of the operations ``result`` comes from whose backward autograd cannot look into.

    Fused attention kernels, and autograd functions written in Python or C++ (attention libraries, compiled models,
    re-entrant checkpointing).
    """
    found, seen, left = set(), set(), [result.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = node.name()
        if isinstance(node, BackwardCFunction) or "CppNode" in name or "Attention" in name:
            found.add(name)
        left += [parent for parent, _ in node.next_functions]
    return found
