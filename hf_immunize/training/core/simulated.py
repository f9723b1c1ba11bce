"""A simulated fine-tuning attack as a term on the weights, to first order.

θ_k = θ_{k−1} − AdamW(∇L_H(θ_{k−1}; B_k)), θ_0 = θ, k = 1..K: what an attacker does, on all weights or on LoRA
factors. L_H is the denoising loss on harmful rows. The term is bounded below and above:

    H(θ) = (1/K) Σ_{k=1..K} relu(c − L_H(θ_k; B_{k+1})),   0 ≤ H ≤ c

Its gradient takes ∂θ_k/∂θ = I (first-order MAML; Finn et al. 2017, section 5.2; Nichol et al. 2018):

    ∇H ≈ −(1/K) Σ_k 1[L_H(θ_k; B_{k+1}) < c] ∇L_H(θ_k; B_{k+1})

so that ∇L_H(θ_k; B_{k+1}) serves both as the attacker's next step and as the defender's gradient: K steps cost K + 1
gradients on harmful rows. The same family as SOPHON (Deng et al. 2024) and ResAlign (2025), whose exact schedules
differ. No second derivative is taken, so fused attention kernels are safe; ``unrolled.py`` has the exact gradient.

A task may ask for more: weights that the attacker draws anew before he starts (the defender has no gradient there), and
a harm of its own in the place of relu(c − L_H), such as one of several depths, at the cost of a second backward a step.

IMMA (Zheng & Yeh 2024, Algorithm 1) is the case K = 1 with LoRA factors φ that *go on* from step to step, moments of
AdamW included, while θ moves: φ descends L_H(θ, φ), then θ, attention projections only, ascends it. Published without
a ceiling; ``attacker_ceiling`` bounds it here as well.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hf_immunize.training.core.attacker import Attacker
from hf_immunize.training.core.distributed import average_with
from hf_immunize.training.core.habits import Habits
from hf_immunize.training.core.weight_terms import AttackedTask, Measure


class SimulatedAttack:
    """H and its first-order gradient at the weights of a model.

    Args:
        task: the harmful loss of a model on the rows of (optimizer step, k), k = 0..K.
        steps, rank: the attacker's; rank 0 trains all weights.
        habits: his optimizer and rate.
        goes_on: whether factors and moments are kept for the next call (IMMA).
    """

    def __init__(
        self, task: AttackedTask, *, steps: int, habits: Habits, rank: int, goes_on: bool = False
    ):
        self._goes_on = goes_on
        self._optimizer: torch.optim.Optimizer | None = None
        self.ceiling = float("inf")
        """c, set once the base's own loss is known."""
        self._task, self._steps, self._habits = task, steps, habits
        self._attacker = Attacker(task.model, task.layers if rank else (), rank, task.tokens)

    def gradient(self, model: nn.Module, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """H and its gradient at the weights of ``model``, by parameter name; equal on every rank."""
        self._start(model, step)
        optimizer = self._optimizer or self._fresh_optimizer(step)
        weights = [self._attacker.weights[name] for name in self._attacker.wanted]
        total = {parameter: torch.zeros_like(parameter) for parameter in weights}
        value = weights[0].new_zeros(())
        for attack_step in range(self._steps + 1):
            if attack_step > 0 and self._task.harm is not None:
                value = value + self._backward_here(step, attack_step, self._task.harm) / self._steps
                for parameter in weights:
                    total[parameter] += gradient_of(parameter) / self._steps
                if attack_step == self._steps:
                    break
            loss = self._backward(step, attack_step)
            if attack_step > 0 and self._task.harm is None:
                value = value + torch.relu(self.ceiling - loss) / self._steps
                if float(loss) < self.ceiling:
                    for parameter in weights:
                        total[parameter] -= gradient_of(parameter) / self._steps
            if attack_step < self._steps:
                optimizer.step()
        if self._task.harm is not None:  # so far of this rank's rows; the attacker does not need their mean
            value = average_with(list(total.values()), value)
        self._attacker.clear()
        self._optimizer = optimizer if self._goes_on else None
        return value, self._attacker.by_name(total)

    def value(self, model: nn.Module) -> Tensor:
        """H at a model, of an attacker who begins anew with the rows and draws of step 0; one that goes on stays."""
        kept, goes_on = self._optimizer, self._goes_on
        factors = [factor.detach().clone() for factor in self._attacker.factors]
        self._optimizer, self._goes_on = None, False
        try:
            return self.gradient(model, 0)[0]
        finally:
            self._optimizer, self._goes_on = kept, goes_on
            with torch.no_grad():
                for factor, before in zip(self._attacker.factors, factors, strict=True):
                    factor.copy_(before)

    def to(self, device: torch.device) -> None:
        """Move what the attacker holds."""
        self._attacker.model.to(device)

    def _fresh_optimizer(self, step: int = 0) -> torch.optim.Optimizer:
        return self._habits.optimizer(self._attacker.trained, self._task.seed, step)

    def state(self) -> dict[str, Tensor]:
        """Ceiling, and factors with their moments where the attacker goes on."""
        kept = {"ceiling": torch.tensor(self.ceiling).double()}
        if self._optimizer is not None:
            moments = self._optimizer.state_dict()["state"]
            for index, factor in enumerate(self._attacker.factors):
                kept[f"factor.{index}"] = factor.detach().cpu().clone()
                kept |= {f"moment.{index}.{name}": torch.as_tensor(v).cpu() for name, v in moments[index].items()}
        return kept

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what ``state`` returned."""
        self.ceiling = float(state["ceiling"])
        if "factor.0" not in state:
            return
        self._optimizer = self._fresh_optimizer()
        moments: dict[int, dict[str, Tensor]] = {}
        for index, factor in enumerate(self._attacker.factors):
            factor.copy_(state[f"factor.{index}"])
            start = f"moment.{index}."
            moments[index] = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})

    def _start(self, model: nn.Module, step: int) -> None:
        """θ_0 = θ, and fresh factors unless those of the last step go on."""
        self._attacker.start(model, self._task.fresh(step) if self._task.fresh else {})
        if self._optimizer is None:
            self._attacker.draw_factors(self._task.seed, "lora", step)

    def _backward(self, step: int, attack_step: int) -> Tensor:
        """Mean harmful loss over all ranks' rows; its gradient, averaged over ranks, is left in the attacker."""
        loss = self._backward_here(step, attack_step)
        return average_with([gradient_of(parameter) for parameter in self._attacker.asked], loss)

    def _backward_here(self, step: int, attack_step: int, what: Measure | None = None) -> Tensor:
        """Mean harmful loss over this rank's rows, whose gradient is left in the attacker.

        Args:
            what: in the place of the task's loss.
        """
        self._attacker.clear()
        with torch.enable_grad():
            loss = self._loss(step, attack_step, what)
            loss.backward()
        for parameter in self._attacker.asked:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return loss.detach()

    def _loss(self, step: int, attack_step: int, what: Measure | None = None) -> Tensor:
        """Mean harmful loss over this rank's rows; the same draws whenever it is asked."""
        torch.clear_autocast_cache()  # it holds casts of the weights as they were before the attacker's step
        return (what or self._task.loss)(self._attacker.model, step, attack_step)


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """What backward left there."""
    assert parameter.grad is not None, "set by backward, or to zeros"
    return parameter.grad
