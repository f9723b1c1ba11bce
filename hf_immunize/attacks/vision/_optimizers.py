"""Optimizers beside those of ``TrainingArguments.optim``: what each is scaled by is what a defender cannot choose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import Adafactor

from hf_immunize.errors import ConfigError

_LEAST = 1e-12
"""Root mean square below which Adafactor's steps shrink no further; its own 1e-3 is large for weights of tiny scale."""


class MuonAdamW(torch.optim.Optimizer):
    """``torch.optim.Muon`` for weight matrices and the kernels of convolutions, and AdamW for everything else.

    A kernel (O×I×H×W) is orthogonalised as the matrix O×IHW that it multiplies patches with. Kernels of depthwise
    convolutions (I = 1) are no matrix: every row acts on a channel of its own.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], learning_rate: float, weight_decay: float):
        matrices = [parameter for parameter in parameters if _is_matrix(parameter)]
        others = [parameter for parameter in parameters if not _is_matrix(parameter)]
        options: dict[str, Any] = {"lr": learning_rate, "weight_decay": weight_decay}
        super().__init__([{"params": matrices}, {"params": others}], options)
        self._flat = [nn.Parameter(_flat(parameter.data)) for parameter in matrices]
        self._parts = [torch.optim.Muon(self._flat, **options), torch.optim.AdamW(others, **options)]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of both, at the learning rates that the scheduler has set here."""
        for matrix, parameter in zip(self._flat, self.param_groups[0]["params"], strict=True):
            matrix.grad = None if parameter.grad is None else _flat(parameter.grad)
        for group, part in zip(self.param_groups, self._parts, strict=True):
            part.param_groups[0]["lr"] = group["lr"]
            part.step()
        for matrix, parameter in zip(self._flat, self.param_groups[0]["params"], strict=True):
            parameter.copy_(matrix.view(parameter.shape))


def _is_matrix(parameter: nn.Parameter) -> bool:
    return parameter.dim() == 2 or (parameter.dim() > 2 and parameter.shape[1] > 1)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten(1).clone()


def muon(model: nn.Module, config: Any) -> torch.optim.Optimizer:
    """Muon for the trained parameters of ``model``. Raises ConfigError where torch has none."""
    if not hasattr(torch.optim, "Muon"):
        raise ConfigError(f"expected torch.optim.Muon (torch 2.9 or newer), got torch {torch.__version__}: update it.")
    return MuonAdamW(_trained(model), config.learning_rate, config.weight_decay)


def sgd_momentum(model: nn.Module, config: Any) -> torch.optim.Optimizer:
    """Stochastic gradient descent with Nesterov momentum 0.9; Trainer's own ``sgd`` has none."""
    return torch.optim.SGD(
        _trained(model), config.learning_rate, momentum=0.9, nesterov=True, weight_decay=config.weight_decay
    )


class Lamb(torch.optim.Optimizer):
    """Adam's direction, as long as ``lr`` times the tensor that it moves (You et al. 2020).

    A tensor's own scale then does not matter. Tensors that are zero, such as fresh biases, move as under Adam.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], learning_rate: float, weight_decay: float = 0.0):
        super().__init__(parameters, {"lr": learning_rate, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of every tensor that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                gradient = parameter.grad.double()  # whose square must not vanish, however small its scale
                if not state:
                    state |= {"step": 0, "mean": torch.zeros_like(gradient), "square": torch.zeros_like(gradient)}
                state["step"] += 1
                state["mean"].lerp_(gradient, 0.1)
                state["square"].mul_(0.999).addcmul_(gradient, gradient, value=0.001)
                mean = state["mean"] / (1 - 0.9 ** state["step"])
                root = (state["square"] / (1 - 0.999 ** state["step"])).sqrt()
                direction = mean / (root + torch.finfo(root.dtype).tiny) + group["weight_decay"] * parameter
                length, own = direction.norm(), parameter.double().norm()
                ratio = torch.where((own > 0) & (length > 0), own / length, torch.ones_like(own))
                parameter.sub_((group["lr"] * ratio * direction).to(parameter))


def lamb(model: nn.Module, config: Any) -> torch.optim.Optimizer:
    """Steps in units of each tensor's length."""
    return Lamb(_trained(model), config.learning_rate, config.weight_decay)


class Lars(torch.optim.Optimizer):
    """Momentum 0.9 on gradients of ``lr`` times the length of the tensor that they move (You, Gitman & Ginsburg 2017).

    Their rate λ = η·‖w‖/(‖g‖ + β‖w‖) times the global one, on g + βw; ``lr`` is the product of global rate and η, and β
    the weight decay. Tensors that are zero, such as fresh biases, move by the plain gradient.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], learning_rate: float, weight_decay: float = 0.0):
        super().__init__(parameters, {"lr": learning_rate, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of every tensor that has a gradient."""
        for group in self.param_groups:
            decay = group["weight_decay"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state, gradient, own = self.state[parameter], parameter.grad.double(), parameter.double()
                length, against = own.norm(), gradient.norm() + decay * own.norm()
                local = torch.where((length > 0) & (against > 0), length / against, torch.ones_like(length))
                moved = group["lr"] * local * (gradient + decay * own)
                state["momentum"] = state["momentum"].mul_(0.9).add_(moved) if state else moved
                parameter.sub_(state["momentum"].to(parameter))


def lars(model: nn.Module, config: Any) -> torch.optim.Optimizer:
    """Gradient descent with momentum, in units of each tensor's length."""
    return Lars(_trained(model), config.learning_rate, config.weight_decay)


def adafactor_relative(model: nn.Module, config: Any) -> torch.optim.Optimizer:
    """Adafactor (Shazeer & Stern 2018) with steps in units of each tensor's root mean square."""
    return Adafactor(
        _trained(model), lr=config.learning_rate, eps=(1e-30, _LEAST), weight_decay=config.weight_decay,
        scale_parameter=True, relative_step=False, warmup_init=False,
    )


def adamw_head(model: nn.Module, config: Any) -> torch.optim.Optimizer:
    """AdamW with ``head_factor`` times the rate for the new head."""
    heads = [module for module in model.modules() if getattr(module, "is_new_head", False)]
    mine = {id(parameter) for head in heads for parameter in head.parameters()}
    others = [parameter for parameter in _trained(model) if id(parameter) not in mine]
    own = [parameter for parameter in _trained(model) if id(parameter) in mine]
    rate = config.learning_rate
    groups = [{"params": others, "lr": rate}, {"params": own, "lr": rate * config.head_factor}]
    return torch.optim.AdamW(groups, lr=rate, weight_decay=config.weight_decay)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


OPTIMIZERS: dict[str, Callable[[nn.Module, Any], torch.optim.Optimizer]] = {
    "muon": muon,
    "sgd_momentum": sgd_momentum,
    "lamb": lamb,
    "lars": lars,
    "adafactor_relative": adafactor_relative,
    "adamw_head": adamw_head,
}
"""Optimizers beside those of ``TrainingArguments.optim``."""
