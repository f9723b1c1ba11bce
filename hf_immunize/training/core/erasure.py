"""Objectives of concept erasure as terms on a denoiser's weights: ESD, and the meta objective of meta-unlearning.

ε_θ(x_t, c) is what the model answers to noised rows of the concept under its name c, ε_θ(x_t) what it answers to the
same rows without one (the empty prompt; see ``training/diffusion/conditions.py``), θ₀ the model before immunization.

    ESD     mean ‖ε_θ(x_t, c) − (ε_θ₀(x_t) − η (ε_θ₀(x_t, c) − ε_θ₀(x_t)))‖²     (Gandikota et al. 2023, ICCV)

η = 1 as published. The target is affine in the answers, with coefficients that sum to 1: it says the same of denoisers
that answer v, x₀ or a velocity. x_t are noised images of the concept; the paper draws them from θ itself.

    meta    1 + cos(∇L_H(θ), ∇L_R(θ)),   between 0 and 2

L_H and L_R are denoising losses on rows of the concept and of what is retained. A step that relearns the concept,
θ − τ∇L_H, changes L_R by −τ⟨∇L_H, ∇L_R⟩ to first order: where the cosine is negative, related benign concepts pay for
it. Meta-unlearning (Gao et al. 2024) maximises L_R after simulated fine-tuning, on top of an unlearning objective: join
them, ``esd+meta_unlearning``. Here it is one step, to first order in τ, and bounded by the cosine. With a = ∇L_H,
b = ∇L_R,

    ∇ = H_H u + H_R w,   u = b/(|a||b|) − cos·a/|a|²,   w = a/(|a||b|) − cos·b/|b|²

by one Hessian-vector product of each loss, on PyTorch's math kernel, which alone has a second derivative.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hf_immunize.errors import ConfigError
from hf_immunize.training.core.attacker import Attacker
from hf_immunize.training.core.distributed import average_over_ranks, average_with
from hf_immunize.training.core.unrolled import hessian_times
from hf_immunize.training.core.weight_terms import AttackedTask, Denoise, WeightTerm

GUIDANCE = 1.0
"""η of ESD: how far the target lies beyond the answer without a name."""


def erased_target(named: Tensor, unnamed: Tensor, guidance: float = GUIDANCE) -> Tensor:
    """ε₀(x) − η (ε₀(x, c) − ε₀(x)), in the shape of the answers."""
    return unnamed - guidance * (named - unnamed)


def _error(answer: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error, in float32 or wider."""
    wide = torch.promote_types(answer.dtype, torch.float32)
    return (answer.to(wide) - wanted.to(wide)).square().mean()


class _OnDenoiser:
    """A term without an attacker: a whole copy of the model, at which it is measured. Nothing goes on between steps.

    Raises:
        ConfigError: a task without noised rows, as that of a classifier.
    """

    ceiling = float("inf")
    """Not used: both values are bounded below."""

    def __init__(self, task: AttackedTask):
        if task.denoise is None:
            raise ConfigError("expected a diffusion pipeline for esd or meta_unlearning, got another model: choose "
                              "simulated_attack.")
        self._denoise: Denoise = task.denoise
        self._copy = Attacker(task.model, (), 0)
        self._copy.model.eval()  # no dropped labels: what is told is what counts

    def _at(self, model: nn.Module) -> list[nn.Parameter]:
        """Take the weights of ``model``; where gradients are asked for."""
        self._copy.start(model)
        torch.clear_autocast_cache()  # it holds casts of the weights as they were
        return [self._copy.weights[name] for name in self._copy.wanted]

    def to(self, device: torch.device) -> None:
        """Move the copy."""
        self._copy.model.to(device)

    def state(self) -> dict[str, Tensor]:
        """Nothing goes on from step to step."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to take back."""


class Erasure(_OnDenoiser):
    """ESD's loss; holds a second copy, of θ₀."""

    def __init__(self, task: AttackedTask):
        super().__init__(task)
        self._base = copy.deepcopy(task.model).requires_grad_(False).eval()

    def gradient(self, model: nn.Module, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its gradient at the weights of ``model``, by parameter name; equal on every rank."""
        weights = self._at(model)
        with torch.no_grad():
            named, unnamed = (self._denoise(self._base, step, of)[0] for of in ("named", "unnamed"))
        with torch.enable_grad():
            loss = _error(self._denoise(self._copy.model, step, "named")[0], erased_target(named, unnamed))
            found = torch.autograd.grad(loss, weights, materialize_grads=True)
        slopes = [slope.contiguous() for slope in found]
        value = average_with(slopes, loss.detach())
        return value, self._copy.by_name(dict(zip(weights, slopes, strict=True)))

    def to(self, device: torch.device) -> None:
        """Move both copies."""
        super().to(device)
        self._base.to(device)


class MetaUnlearning(_OnDenoiser):
    """1 + cos(∇L_H, ∇L_R) and its exact gradient."""

    def gradient(self, model: nn.Module, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The value and its gradient at the weights of ``model``, by parameter name; equal on every rank."""
        weights = self._at(model)
        a, b = (self._slopes(weights, step, of) for of in ("named", "related"))
        lengths, cosine = (_dot(a, a).sqrt(), _dot(b, b).sqrt()), _cosine(a, b)
        total = [torch.zeros_like(weight) for weight in weights]
        if float(lengths[0] * lengths[1]) > 0:
            for of, one, other, length in (("named", a, b, lengths[0]), ("related", b, a, lengths[1])):
                crossed, own = 1 / (lengths[0] * lengths[1]), cosine / length.square()
                pushed = [y * crossed.to(y) - x * own.to(x) for x, y in zip(one, other, strict=True)]
                torch._foreach_add_(total, self._hessian(weights, step, of, pushed))
        return (1 + cosine).to(weights[0]), self._copy.by_name(dict(zip(weights, total, strict=True)))

    def _loss(self, step: int, of: str) -> Tensor:
        return _error(*self._denoise(self._copy.model, step, of))

    def _slopes(self, weights: list[nn.Parameter], step: int, of: str) -> list[Tensor]:
        """∇L of all ranks' rows."""
        with torch.enable_grad():
            found = torch.autograd.grad(self._loss(step, of), weights, materialize_grads=True)
        slopes = [slope.contiguous() for slope in found]
        average_over_ranks(slopes)
        return slopes

    def _hessian(self, weights: list[nn.Parameter], step: int, of: str, direction: list[Tensor]) -> list[Tensor]:
        """H times a direction, of all ranks' rows."""
        pulled = hessian_times(lambda: self._loss(step, of), weights, direction, "meta_unlearning")
        average_over_ranks(pulled)
        return pulled


def _dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Inner product over all tensors, in float64."""
    return torch.stack([(x * y).sum(dtype=torch.float64) for x, y in zip(a, b, strict=True)]).sum()


def _cosine(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """cos of the angle between two gradients; 0 where one of them is zero."""
    lengths = _dot(a, a).sqrt() * _dot(b, b).sqrt()
    return torch.where(lengths > 0, _dot(a, b) / lengths.clamp(min=torch.finfo(lengths.dtype).tiny), 0.0)


ESD = WeightTerm(
    "harmful_erasure", lambda task, _: Erasure(task), erases=True,
    achieves="The concept is drawn less under its own name; no attacker was simulated: fine-tuning may bring it back.",
)
META_UNLEARNING = WeightTerm(
    "harmful_relearning_cosine", lambda task, _: MetaUnlearning(task), erases=True,
    achieves="A first step towards the concept costs more of what is retained; later steps were not simulated.",
)
