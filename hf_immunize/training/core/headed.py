"""A simulated attacker with a head of his own, and a defender with another aim than his loss: SOPHON, TAR.

The attacker starts at θ_0 = θ with a fresh head w_0 and descends the cross-entropy L of harmful rows,

    (θ_k, w_k) = (θ_{k−1}, w_{k−1}) − AdamW(∇L(θ_{k−1}, w_{k−1}; B_k)),   k = 1..K

and the defender lowers the mean of S(f(θ_k, w_k; B_{k+1})) over k, to first order (∂θ_k/∂θ = I). S is one of:

    inverse cross-entropy   −log(1 − p_y)           SOPHON, for classifiers (Deng et al. 2024, IEEE S&P)
    uniform                 KL(U ‖ p)               SOPHON
    entropy                 log C − H(p)            TAR's tamper-resistance loss (Tamirisa et al. 2025, ICLR)

Each is at least 0, so none needs a ceiling. SOPHON takes turns between this and natural training; here both gradients
are of one step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_immunize.errors import ConfigError
from hf_immunize.training.core.attacker import Attacker
from hf_immunize.training.core.distributed import average_over_ranks, average_with
from hf_immunize.training.core.draws import generator_of
from hf_immunize.training.core.habits import Habits, habits_of
from hf_immunize.training.core.weight_terms import AttackedTask, WeightTerm

Aim = Callable[[Tensor, Tensor], Tensor]
"""From logits (N×C) and labels (N) to a scalar that the defender lowers."""


def inverse_cross_entropy(logits_NC: Tensor, labels_N: Tensor) -> Tensor:
    """Mean of −log(1 − p_y): 0 where the true class has no probability at all.

    1 − p_y is the softmax sum over the other classes, so that nothing is lost where p_y is near 1.
    """
    others = logits_NC.masked_fill(torch.nn.functional.one_hot(labels_N, logits_NC.shape[1]).bool(), -torch.inf)
    return (torch.logsumexp(logits_NC, dim=1) - torch.logsumexp(others, dim=1)).mean()


def uniform_divergence(logits_NC: Tensor, labels_N: Tensor) -> Tensor:
    """Mean of KL(U ‖ p) = −log C − mean_c log p_c: 0 where every class is as likely as any other."""
    classes = torch.tensor(float(logits_NC.shape[1])).to(logits_NC)
    return (-torch.log_softmax(logits_NC, dim=1).mean(dim=1) - classes.log()).mean()


def missing_entropy(logits_NC: Tensor, labels_N: Tensor) -> Tensor:
    """Mean of log C − H(p): 0 where the attacked model is as unsure as it can be."""
    log_p = torch.log_softmax(logits_NC, dim=1)
    classes = torch.tensor(float(logits_NC.shape[1])).to(logits_NC)
    return (classes.log() + (log_p.exp() * log_p).sum(dim=1)).mean()


def gain_below_chance(logits_NC: Tensor, labels_N: Tensor) -> Tensor:
    """relu(1 − L/log C), L the cross-entropy: how far below chance an attacker is, and no more to gain beyond it."""
    loss = torch.nn.functional.cross_entropy(logits_NC, labels_N)
    return torch.relu(1 - loss / torch.tensor(float(logits_NC.shape[1])).to(logits_NC).log())


def _slopes(value: Tensor, parameters: list[nn.Parameter], keep: bool = False) -> dict[nn.Parameter, Tensor]:
    """Gradients on this rank; zeros where a parameter has no part in the value."""
    found = torch.autograd.grad(value, parameters, retain_graph=keep, materialize_grads=True)
    return {parameter: slope.contiguous() for parameter, slope in zip(parameters, found, strict=True)}


class HeadedAttack:
    """The mean of an aim over an attacker's steps, and its first-order gradient.

    Args:
        task: gives features of harmful rows of any copy of the model, with their labels.
        aim: S above.
        steps, rank: the attacker's; rank 0 trains all weights.
        habits: his optimizer and rate.

    Raises:
        ConfigError: a task without features and labels, as that of a denoiser.
    """

    ceiling = float("inf")
    """Not used: every aim is bounded below."""

    def __init__(self, task: AttackedTask, aim: Aim, *, steps: int, habits: Habits, rank: int):
        if task.features is None:
            raise ConfigError("expected an image classifier for an objective whose attacker has a head, got another "
                              "model: choose simulated_attack.")
        self._task, self._aim, self._steps, self._habits = task, aim, steps, habits
        self._attacker = Attacker(task.model, task.layers if rank else (), rank)

    def gradient(self, model: nn.Module, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean aim and its gradient at the weights of ``model``, by parameter name; equal on every rank."""
        attacker = self._attacker
        attacker.start(model, self._task.fresh(step) if self._task.fresh else {})
        attacker.draw_factors(self._task.seed, "lora", step)
        weights = [attacker.weights[name] for name in attacker.wanted]
        total = {parameter: torch.zeros_like(parameter) for parameter in weights}
        value = weights[0].new_zeros(())
        head: list[nn.Parameter] = []
        optimizer: torch.optim.Optimizer | None = None
        for attack_step in range(self._steps + 1):
            with torch.enable_grad():
                logits, labels = self._logits(step, attack_step, head)
            if optimizer is None:
                optimizer = self._habits.optimizer([*attacker.trained, *head], self._task.seed, step)
            if attack_step > 0:
                with torch.enable_grad():
                    aim = self._aim(logits, labels)
                value = value + aim.detach().to(value) / self._steps
                for parameter, slope in _slopes(aim, weights, keep=attack_step < self._steps).items():
                    total[parameter] += slope / self._steps
            if attack_step < self._steps:
                with torch.enable_grad():
                    loss = torch.nn.functional.cross_entropy(logits, labels)
                slopes = _slopes(loss, [*attacker.trained, *head])
                average_over_ranks(list(slopes.values()))
                for parameter, slope in slopes.items():
                    parameter.grad = slope
                optimizer.step()
        value = average_with(list(total.values()), value)
        attacker.clear()
        return value, attacker.by_name(total)

    def _logits(self, step: int, attack_step: int, head: list[nn.Parameter]) -> tuple[Tensor, Tensor]:
        """Logits and labels of this rank's rows; the head is drawn at the first call, as torch draws a linear layer."""
        assert self._task.features is not None
        torch.clear_autocast_cache()  # it holds casts of the weights as they were before the attacker's step
        features, labels, classes = self._task.features(self._attacker.model, step, attack_step)
        features = features.float() if features.element_size() < 4 else features  # the head is trained: not in bfloat16
        if not head:
            generator, width = generator_of(self._task.seed, "head", step), features.shape[1]
            drawn = torch.rand(classes, width + 1, generator=generator, dtype=torch.float64)
            whole = ((2 * drawn - 1) * width**-0.5).to(features)
            head += [nn.Parameter(whole[:, :-1].clone()), nn.Parameter(whole[:, -1].clone())]
        return features @ head[0].T + head[1], labels.to(features.device)

    def to(self, device: torch.device) -> None:
        """Move what the attacker holds."""
        self._attacker.model.to(device)

    def state(self) -> dict[str, Tensor]:
        """Nothing goes on from step to step."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to take back."""


def build_headed(aim: Aim, task: AttackedTask, args: Any) -> HeadedAttack:
    """The attack that the options describe."""
    return HeadedAttack(task, aim, steps=args.attacker_steps, habits=habits_of(args), rank=args.attacker_rank)


_headed = partial(WeightTerm, tells_classes_apart=True)
SOPHON_ICE = _headed("harmful_inverse_cross_entropy", partial(build_headed, inverse_cross_entropy))
SOPHON_KLU = _headed("harmful_uniform_divergence", partial(build_headed, uniform_divergence))
TAR_ENTROPY = _headed("harmful_missing_entropy", partial(build_headed, missing_entropy))
